"""From words to layers: the prompts of an edit, the shipped list, and edits on a text encoder made of random words."""

from __future__ import annotations

import zlib

import pytest
import torch

from unguide_core.closed_form import ClosedForm
from unguide_core.text_edit import Edited, Kept, TextLayers, edit_text
from unguide_core.training.prompts import OTHER_PROMPTS, Pair, names_a_word
from unguide_core.vocabulary import (
    KINDS,
    MEASURED,
    PAIR_LIMIT,
    Edit,
    kept_prompts,
    pairs_of,
    shipped_prompts,
    unseen_prompts,
)

WIDTH, POOLED, TOKENS = 24, 16, 6
SCENES = ("forest", "sea")


def word(text: str, width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def encode(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """States that carry what came before them, like a causal encoder's; the last one is pooled."""
    words = ["<start>", *prompt.split(), "<end>"][:TOKENS]
    words += ["<pad>"] * (TOKENS - len(words))
    states = torch.stack([word(one, WIDTH) for one in words])
    mixed = states + states.cumsum(0) / 3
    return mixed, torch.stack([word(one, POOLED) for one in words]).sum(0)


LAYERS = TextLayers(
    {"k": torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(1)), "v": torch.eye(WIDTH)},
    {"embedding": torch.randn(20, POOLED + 4, generator=torch.Generator().manual_seed(2))},
)
CAT = Edit("cat", "forest", ("kitty",), scenes=SCENES)
WORDS = ("dog", "bird", "house", "forest", "sea", "")
KEPT = tuple(f"a photo of the {one}".strip() for one in WORDS)


def edited(*edits: Edit, rank: int = 4) -> Edited:
    settings = ClosedForm(rank=rank, explained=1.0, regularization=1e-6)
    return edit_text(edits, Kept.of(KEPT, encode), LAYERS, encode, settings)


def moved(found: Edited, prompt: str, reference: str) -> float:
    """How near to the reference a prompt came: 0 at the reference, 1 where it was."""
    states, wanted = encode(prompt)[0], encode(reference)[0]
    return float((found.tokens(states) - wanted).norm() / (states - wanted).norm())


def test_an_edit_leads_its_words_to_the_reference_and_leaves_kept_prompts() -> None:
    found = edited(CAT)
    assert moved(found, "a photo of the cat", "a photo of the forest") < 0.4
    assert moved(found, "a kitty in the sea", "a photo of the sea") < 0.5
    for prompt in KEPT:
        states = encode(prompt)[0]
        assert (found.tokens(states) - states).norm() < 0.12 * states.norm()


def test_the_pooled_state_has_a_map_of_its_own() -> None:
    found = edited(CAT)
    assert set(found.layers) == {"k", "v", "embedding"}
    own, wanted = encode("a photo of the cat")[1], encode("a photo of the forest")[1]
    assert (found.pooled(own) - wanted).norm() < 0.3 * (own - wanted).norm()
    weight, delta = LAYERS.pooled["embedding"], found.layers["embedding"].weight_delta()
    assert torch.allclose(delta[:, :POOLED] @ own, weight[:, :POOLED] @ (found.pooled(own) - own), atol=1e-3)
    assert not delta[:, POOLED:].any()


def test_an_encoder_without_a_pooled_state_needs_no_layer_for_it() -> None:
    def tokens_alone(prompt: str) -> tuple[torch.Tensor, None]:
        return encode(prompt)[0], None

    found = edit_text([CAT], Kept.of(KEPT, tokens_alone), LAYERS, tokens_alone, ClosedForm())
    assert set(found.layers) == {"k", "v"}
    assert found.pooled is None


def test_several_concepts_in_one_edit_are_all_erased_within_the_rank_of_each() -> None:
    cow = Edit("cow", "sea", scenes=SCENES)
    found = edited(CAT, cow, rank=3)
    assert found.tokens.rank <= 6
    assert moved(found, "a photo of the cat", "a photo of the forest") < 0.5
    assert moved(found, "a photo of the cow", "a photo of the sea") < 0.5


def test_kept_prompts_that_name_a_word_to_erase_do_not_count() -> None:
    named = ("the cat", "two kittys")
    without = Kept.of((*KEPT, *named), encode).without(CAT.words, encode)
    assert without.prompts == KEPT
    assert torch.allclose(without.tokens.sum, Kept.of(KEPT, encode).tokens.sum)
    assert without.tokens.count == TOKENS * len(KEPT)
    with pytest.raises(ValueError, match="every prompt to keep"):
        Kept.of(named, encode).without(CAT.words, encode)
    with pytest.raises(ValueError, match="no prompts to keep"):
        Kept.of((), encode)


def test_an_object_gives_way_to_its_reference_and_in_scenes_to_the_scene() -> None:
    assert CAT.pairs[0] == Pair("a photo of the cat", "a photo of the forest")
    assert Pair("kitty", "forest") in CAT.pairs
    assert Pair("a cat in the sea", "a photo of the sea") in CAT.pairs
    owl = Edit("owl", "elm", scenes=())
    assert Pair("a picture of an owl", "a picture of an elm") in owl.pairs


def test_a_person_gives_way_to_another_person_and_a_style_to_the_plain_content() -> None:
    person = Edit("Ada Lovelace", "a person", kind="person", scenes=SCENES)
    assert Pair("Ada Lovelace in the sea", "a person in the sea") in person.pairs
    style = Edit("Hokusai", kind="style", scenes=SCENES)
    assert Pair("a painting in the style of Hokusai", "a painting") in style.pairs
    assert Pair("the sea by Hokusai", "the sea") not in style.pairs
    assert Pair("the sea in the style of Hokusai", "the sea") in style.pairs
    other = Edit("Hokusai", "Monet", kind="style", scenes=SCENES)
    assert Pair("a portrait by Hokusai", "a portrait in the style of Monet") in other.pairs


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"kind": "thing"}, "expected one of object, person, style"),
        ({"concept": " "}, "no concept is named"),
        ({"reference": ""}, "give what to generate instead"),
        ({"reference": "Cat"}, "nothing to erase"),
        ({"synonyms": tuple(map(str, range(PAIR_LIMIT)))}, "pairs of prompts; expected"),
    ],
)
def test_words_that_mean_nothing_are_refused(changed: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Edit(**{"concept": "cat", "reference": "forest", **changed})


def test_lines_are_pairs_and_lines_without_an_arrow_lead_to_the_empty_prompt() -> None:
    text = "a cat -> a forest\n\na nude person\n"
    assert pairs_of(text) == (Pair("a cat", "a forest"), Pair("a nude person", ""))
    assert Edit("", more=pairs_of(text)).pairs == pairs_of(text)


def test_the_shipped_list_has_some_thousand_prompts_each_once_the_commonest_first() -> None:
    prompts = shipped_prompts()
    assert 3000 < len(prompts) == len(set(prompts))
    assert "" in prompts[:5]
    assert all(prompt == " ".join(prompt.split()) and len(prompt) < 60 for prompt in prompts)
    first = kept_prompts(())
    assert {"a painting by Rembrandt", "a city at night"} < set(prompts)
    assert any(prompt.endswith("painting") for prompt in first)
    assert len([prompt for prompt in first if prompt.startswith("a photo of the")]) > 50


def test_kept_prompts_are_those_given_and_the_shipped_ones_without_the_concept() -> None:
    kept = kept_prompts(("cat", "kitty"), ("a lynx", "my cat"), 300)
    assert kept[0] == "a lynx"
    assert 250 < len(kept) <= 301
    assert not any(names_a_word(prompt, ("cat", "kitty")) for prompt in kept)
    assert kept_prompts((), ("a lynx",), 0) == ("a lynx",)


def test_separation_is_measured_on_prompts_that_are_not_kept() -> None:
    unseen = unseen_prompts(300)
    assert len(unseen) == len(set(unseen)) == MEASURED
    assert set(unseen) & set(shipped_prompts()[:300]) <= set(OTHER_PROMPTS)
    assert set(OTHER_PROMPTS) <= set(unseen)


def test_every_kinds_templates_have_a_place_for_the_word_and_scenes_for_the_scene() -> None:
    for kind in KINDS.values():
        assert all("{}" in target for target, _ in (*kind.alone, *kind.inside))
        assert all("{scene}" in one for pair in kind.inside for one in pair)
