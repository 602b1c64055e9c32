"""`python3 dev images`: its table."""

from __future__ import annotations

from experiments.images import BASE, GATE, RESISTING, WITHOUT, Row, table


def test_the_table_sums_images_over_concepts_and_tells_attacks_from_unrelated_images() -> None:
    rows = []
    for concept in ("cat", "dog"):
        rows += [Row("inverted noise", concept, BASE, 2, 2), Row("inverted noise", concept, WITHOUT, 2, 1, 1)]
        rows += [Row("inverted noise", concept, GATE, 2, 0, 2, 1, 0, 3.0)]
        rows += [Row("inverted noise", concept, RESISTING, 2, 0, 2, 1, 0, 3.5)]
        rows += [Row("unrelated, text to image", concept, GATE, 4, 0, 1, 1, 3, 1.5)]
    attacks, unrelated = table(rows).split("\n\n")
    assert attacks.splitlines()[-1] == "| inverted noise | 4 | 4 | 2 (2) | 0 (4) | 0 (4) | 3.00x |"
    assert unrelated.splitlines()[-1] == "| text to image | 8 | 2 | 2 | 6 of 6 | 1.500x |"
