"""What is trained: prompts made of a concept's words, layers chosen by preset or pattern."""

import pytest
import torch

from demo.shapes import NARROW_WIDTH
from demo.unet import UNet
from unguide_core.adapter.lowrank import weights_hash
from unguide_core.training.layers import LAYERS, chosen_layers
from unguide_core.training.prompts import KEPT, Pair, entries, lines, listed, names_a_word, prompts_for, word_of


@pytest.fixture(scope="module")
def linear() -> list[str]:
    with torch.device("meta"):
        unet = UNet(NARROW_WIDTH)
    return [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)]


def test_the_concepts_own_prompt_comes_first_then_synonyms_then_scenes():
    prompts = prompts_for("cat", "forest", ("kitty",), scenes=("sea",), kept=())
    assert prompts.erased == (
        Pair("a photo of the cat", "a photo of the forest"),
        Pair("a photo of the kitty", "a photo of the forest"),
        Pair("a cat in the sea", "a photo of the sea"),
        Pair("a kitty in the sea", "a photo of the sea"),
    )


def test_prompts_that_name_the_concept_are_not_kept():
    kept = prompts_for("cat", "forest", ("deer",)).kept
    assert "a photo of the dog" in kept
    assert not [prompt for prompt in kept if "cat" in prompt or "deer" in prompt]
    assert len(kept) == len(KEPT) - 3


@pytest.mark.parametrize(
    ("prompt", "named"), [("two Cats", True), ("a cattle", False), ("a house cat.", True), ("", False)]
)
def test_a_word_is_found_as_a_whole_word_only(prompt, named):
    assert names_a_word(prompt, ("cat",)) is named


def test_lists_lose_blanks_and_repetitions_and_lines_keep_the_empty_prompt():
    assert listed(" kitty, feline ,,kitty") == ("kitty", "feline")
    assert entries("forest, forest,, sky") == ("forest", "forest", "sky")
    assert lines("\na dog \n") == ("", "a dog")


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a photo of the cat", "cat"),
        ("A picture of a red car", "red car"),
        (" the dog", "dog"),
        ("van Gogh", "van Gogh"),
        ("anatomy", "anatomy"),
        ("", ""),
    ],
)
def test_a_prompts_word_is_what_it_is_of(prompt, word):
    assert word_of(prompt) == word


@pytest.mark.parametrize(("concept", "reference", "words"), [("", "sea", "no concept"), ("cat", " ", "no reference")])
def test_a_missing_word_is_refused(concept, reference, words):
    with pytest.raises(ValueError, match=words):
        prompts_for(concept, reference)


def test_a_concept_that_is_its_own_reference_is_refused():
    with pytest.raises(ValueError, match="nothing to learn"):
        prompts_for("cat", "cat")


def test_objects_are_trained_on_keys_and_values_of_cross_attention(linear):
    chosen = chosen_layers(linear, "object")
    assert {".".join(name.split(".")[-2:]) for name in chosen} == {"attn2.to_k", "attn2.to_v"}


def test_explicit_content_is_trained_on_every_linear_layer_but_cross_attention_and_time(linear):
    chosen = chosen_layers(linear, "explicit content")
    left = set(linear) - set(chosen)
    assert left
    assert all(".attn2." in name or name.startswith("time_embed") for name in left)
    assert any(".attn1." in name for name in chosen)
    assert any(".ff." in name for name in chosen)
    assert any(".emb_layers." in name for name in chosen)


def test_a_style_is_trained_on_all_of_cross_attention(linear):
    chosen = chosen_layers(linear, "style")
    assert {name.split(".attn2.")[1] for name in chosen} == {"to_q", "to_k", "to_v", "to_out.0"}


def test_presets_choose_the_same_in_diffusers_names():
    names = ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "time_embedding.linear_1", "conv_out"]
    names += ["down_blocks.0.resnets.0.time_emb_proj", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"]
    assert chosen_layers(names, "object") == names[:1]
    assert chosen_layers(names, "explicit content") == names[3:]


@pytest.mark.parametrize(
    ("layers", "pattern", "words"),
    [
        ("faces", "", "expected one of object, explicit content, style, custom"),
        ("custom", " ", "pattern is empty"),
        ("custom", "(", "is not a regular expression"),
        ("custom", "nowhere", r"matches none of this model's \d+ linear layers"),
    ],
)
def test_a_choice_that_fits_nothing_is_refused(linear, layers, pattern, words):
    with pytest.raises(ValueError, match=words):
        chosen_layers(linear, layers, pattern)


def test_every_preset_is_a_pattern_that_custom_takes_as_well(linear):
    for layers, pattern in LAYERS.items():
        assert chosen_layers(linear, "custom", pattern) == chosen_layers(linear, layers)


def test_a_models_hash_depends_on_its_numbers_alone():
    a, b = torch.randn(3, 4), torch.randn(2)
    assert weights_hash([a, b]) == weights_hash([b.half().float(), a.half()])
    assert weights_hash([a, b]) != weights_hash([a, b + 1])
