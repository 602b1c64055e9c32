"""`python3 dev training`: what the variants of the recipe are trained with, and the tables."""

from __future__ import annotations

from typing import Any

import pytest

from demo.captions import CLASSES, words_for
from experiments import training
from experiments.commands import VARIANTS, WAYS

SHARES = {"Acc_e": 0.0, "Acc_g": 1.0, "in scenes": 2.0, "Acc_s": 99.0, "six classes": 98.0}


def row(concept: str, *ways: str, seed: int = 0, worst: float = 90.0, missed: float = 0.0) -> dict[str, Any]:
    alone = {**SHARES, "worst class": worst, "Acc_e": missed}
    one = {"evaluations": 3000, "iterations": 100, "seconds": 30.0, "alone": alone}
    return {"concept": concept, "seed": seed, **dict.fromkeys(ways, one)}


def test_every_variant_has_a_recipe() -> None:
    assert tuple(training.RECIPE_OF) == VARIANTS


@pytest.mark.parametrize("concept", CLASSES)
def test_a_variant_never_trains_on_what_it_leaves_out(concept: str) -> None:
    alone = training.prompts_for("no synonyms", concept)
    assert not any(word in pair.target.split() for pair in alone.erased for word in words_for(concept)[1:])
    few = training.prompts_for("three classes kept", concept)
    hidden = [word for other in training.unseen(concept) for word in words_for(other)]
    assert len(training.unseen(concept)) == 6
    assert not any(word in prompt.split() for prompt in few.kept for word in hidden)


def test_the_tables_have_every_concept_by_program_and_the_means_of_every_variant() -> None:
    both = [row("cat", *WAYS[:2], missed=1.0), row("dog", *WAYS[:2], missed=2.0)]
    erased, costs = training.tables(both).split("\n\n")
    assert erased.splitlines()[2] == "| cat | 1 / 1 / 2 / 99 | 1 / 1 / 2 / 99 | - |"
    assert erased.splitlines()[-1].startswith("| **mean** | 2 / 1 / 2 / 99 |")
    assert costs.splitlines()[-1] == "| **mean** | 3000 | 3000 | 30 | 30 |"
    variants = [row("cat", "one rate", worst=40.0), row("cat", "one rate", seed=1, worst=60.0, missed=10.0)]
    expected = "| one rate | 2 | 5.0 (0.0 to 10.0) | 1.0 | 2.0 | 99.0 | 98.0 | 40 | 100 | 3000 | 30 |"
    assert training.tables(variants).splitlines()[-1] == expected
