"""Erase Concept: words to erasure LoRAs, on the demo model and on tiny random models that the host builds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.ops
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models_base
import pytest
import torch
from comfy import sd1_clip
from comfy.text_encoders import sd2_clip

from tests.conftest import pack_module
from tests.host.conftest import CAT, UNRELATED, Demo, Observer, fixed, guided, ksampler
from tests.host.families import FAMILIES, Family
from tests.host.test_blending import relative
from tests.host.test_training import demo_weights, scaled_fp8  # noqa: F401

concept, erased_layers = pack_module("unguide_comfy.erase.concept"), pack_module("unguide_comfy.erase.layers")
states = pack_module("unguide_comfy.erase.states")
core, edits = pack_module("unguide_core.closed_form"), pack_module("unguide_core.text_edit")
vocabulary, formats = pack_module("unguide_core.vocabulary"), pack_module("unguide_core.formats")
weights, match = pack_module("unguide_comfy.model.weights"), pack_module("unguide_comfy.lora.match")
calibration, keys = pack_module("unguide_core.probe.calibration"), pack_module("unguide_comfy.model.key")
node = pack_module("nodes.erase").EraseConcept

SHIPPED = 30  # the training's own list, which is enough here
SCENES = ("forest", "sea")
ENCODERS = {
    "SD 1.x": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
    "SD 2.x": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
    "SDXL": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
}


def shallow_clip(name: str, **shape: int) -> Any:
    """The host's CLIP of a family, its weights not set."""
    options = {f"{model}_model_config": shape for model in ("", "clip_l", "clip_g", "clip_h")}
    target = comfy.supported_models_base.ClipTarget(*ENCODERS[name])
    return comfy.sd.CLIP(target, model_options={**options, "dtype": torch.float32})


def tiny_clip(name: str) -> Any:
    """The host's CLIP of a family with three layers and random weights."""
    clip = shallow_clip(name, num_hidden_layers=3, intermediate_size=64)
    generator = torch.Generator().manual_seed(5)
    pool = torch.randn(1 << 20, generator=generator)
    for parameter in clip.cond_stage_model.parameters():
        start = int(torch.randint(1000, (), generator=generator))
        values = pool.repeat(-(-(parameter.numel() + start) // len(pool)))[start : start + parameter.numel()]
        values = values.reshape(parameter.shape)
        parameter.data = 1.0 + 0.1 * values if parameter.ndim < 2 else values / parameter.shape[-1] ** 0.5
    return clip


@pytest.fixture(scope="module", params=ENCODERS, ids=str)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Family, Any]]:
    """A tiny model and its CLIP, one at a time."""
    family = FAMILIES[request.param]
    with torch.inference_mode():
        yield family, tiny_clip(request.param)
    family.__dict__.pop("model", None)


def words(*concepts: str, **options: Any) -> Any:
    return concept.Words(concepts, **{"references": ("forest",), "scenes": SCENES, "shipped": SHIPPED, **options})


def erased(model: Any, clip: Any, chosen: Any = None, **settings: Any) -> Any:
    (lora,), _ = concept.erase_concepts(model, clip, chosen or words("cat"), core.ClosedForm(**settings))
    return lora


@pytest.fixture(scope="module")
def tiny(pair: tuple[Family, Any]) -> Any:
    family, clip = pair
    return erased(family.model, clip)


def test_every_layer_that_reads_the_prompt_is_changed_and_no_other(pair, tiny):
    family, _ = pair
    names = [name for name, _ in family.model.model.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    pooled = [erased_layers.POOLED] if family.name == "SDXL" else []
    assert sorted(tiny.adapter.layers) == sorted([*names, *pooled])
    for name, layer in tiny.adapter.layers.items():
        assert layer.weight_shape == family.model.model.get_submodule(name).weight.shape
        assert {layer.down.dtype, layer.up.dtype} == {torch.float32}
    assert len(match.match(tiny.adapter, family.model.model, "x").layers) == len(tiny.adapter.layers)


def test_its_text_stage_is_calibrated_for_the_model(pair, tiny):
    family, _ = pair
    found = calibration.Calibration.from_card(tiny.adapter.card.calibration)
    assert (found.model, found.adapter) == (keys.model_key(family.model), tiny.adapter.signature)
    assert found.text.text.concept.count == tiny.adapter.card.settings["pairs"]
    assert len(found.text.direction) == tiny.concept[0][0].shape[-1]


def test_the_change_is_the_dense_ridge_solution_of_the_clips_states_and_the_models_weights(pair):
    family, clip = pair
    edit = vocabulary.Edit("cat", "forest", scenes=SCENES[:1])
    prompts = ("", "a photo of the dog", "a photo of the forest", "a bird in the sky")
    encode = states.States(clip)
    width = encode("")[0].shape[-1]
    layers = erased_layers.text_layers(family.model, width)
    settings = core.ClosedForm(rank=128, explained=1.0, regularization=0.05)
    found = edits.edit_text([edit], edits.Kept.of(prompts, encode), layers, encode, settings)

    def dense(part: int) -> torch.Tensor:
        c, r = (
            torch.stack([encode(getattr(one, side))[part] for one in edit.pairs]) for side in ("target", "reference")
        )
        c, r, k = (x.double().reshape(-1, x.shape[-1]) for x in (c, r, torch.stack([encode(p)[part] for p in prompts])))
        a = c.T @ c / len(c)
        gram = a + k.T @ k / len(k)
        gram += 0.05 * a.trace() / len(a) * torch.eye(len(a))
        return torch.linalg.solve(gram, c.T @ (r - c) / len(c)).T

    change, probe = dense(0), encode("a photo of the cat")[0].double()
    for name, weight in list(layers.tokens.items())[:3]:
        felt = weight.double() @ (change @ probe.T)
        delta = found.layers[name].delta(probe.float()).double().T
        assert (delta - felt).norm() < 0.02 * felt.norm()
    if layers.pooled:
        change, probe = dense(1), encode("a photo of the cat")[1].double()
        (weight,) = layers.pooled.values()
        felt = weight[:, : len(probe)].double() @ (change @ probe)
        inputs = torch.cat([probe, torch.ones(weight.shape[1] - len(probe))]).float()
        delta = found.layers[erased_layers.POOLED].delta(inputs).double()
        assert (delta - felt).norm() < 0.02 * felt.norm()


def test_erased_predictions_are_those_of_erased_text_states(pair, tiny):
    """The adapter on the model equals the model on c + E c, pooled state included."""
    family, clip = pair
    encode = states.States(clip)
    layers = erased_layers.text_layers(family.model, encode("")[0].shape[-1])
    kept = edits.Kept.of(vocabulary.kept_prompts((), (), SHIPPED), encode).without(("cat",), encode)
    edit = vocabulary.Edit("cat", "forest", scenes=SCENES)
    found = edits.edit_text([edit], kept, layers, encode, core.ClosedForm())
    ((text, options),) = tiny.concept
    more = {} if found.pooled is None else {"pooled_output": found.pooled(options["pooled_output"])}
    moved = [[found.tokens(text), {**options, **more}]]
    size = family.latent(1)
    by_states = ksampler(family.model, moved, moved, size, steps=1, cfg=1.0)
    by_adapter = ksampler(fixed(family.model, tiny, 0.0), tiny.concept, tiny.concept, size, steps=1, cfg=1.0)
    base = ksampler(family.model, tiny.concept, tiny.concept, size, steps=1, cfg=1.0)
    assert relative(by_adapter, by_states) < 1e-3
    assert relative(by_adapter, base) > 20 * relative(by_adapter, by_states)


def test_it_is_saved_and_read_again_in_every_format_for_the_whole_model(pair, tiny, tmp_path):
    family, _ = pair
    for name, kind in formats.FORMATS.items():
        path = tmp_path / f"{name}{kind.suffix}"
        formats.save_adapter(tiny.adapter, path, name, layout=family.layout)
        again = match.match(formats.load_adapter(path), family.model.model, name).layers
        assert set(again) == set(tiny.adapter.layers)
        for layer, own in tiny.adapter.layers.items():
            assert torch.allclose(again[layer].weight_delta(), own.weight_delta(), atol=1e-6)


def test_patched_weights_are_the_ones_that_are_edited(pair):
    family, clip = pair
    (name, *_) = erased_layers.text_layers(family.model, states.States(clip)("")[0].shape[-1]).tokens
    shape = family.model.model.get_submodule(name).weight.shape
    patched = family.model.clone()
    patched.add_patches({f"{name}.weight": (torch.full(tuple(shape), 0.5),)}, 1.0)
    used = weights.used_weights(patched, [f"{name}.weight"])[f"{name}.weight"]
    plain = weights.used_weights(family.model, [f"{name}.weight"])[f"{name}.weight"]
    assert torch.allclose(used, plain + 0.5, atol=1e-6)
    edited = erased(patched, clip).adapter.layers[name]
    other = erased(family.model, clip).adapter.layers[name]
    assert relative(edited.weight_delta(), other.weight_delta()) > 0.1


@pytest.mark.parametrize("name", ["SD 3.x", "Flux dev"])
def test_a_model_without_cross_attention_is_refused_with_the_remedy(name):
    family = FAMILIES[name]
    with torch.inference_mode(), pytest.raises(ValueError, match="use Train Erasure LoRA"):
        erased_layers.text_layers(family.model, family.text)
    family.__dict__.pop("model", None)


def test_a_clip_of_another_checkpoint_is_refused(demo: Demo):
    with pytest.raises(ValueError, match="connect the CLIP of the same checkpoint"):
        erased_layers.text_layers(demo.model, 1024)


# ---------------------------------------------------------------- the demo model


@pytest.fixture(scope="module")
def clip(demo: Demo) -> Any:
    return demo.clip


@pytest.fixture(scope="module")
def demo_cat(demo: Demo, clip: Any) -> Any:
    with torch.inference_mode():
        return erased(demo.model, clip, words("cat", synonyms=(("kitty",),)))


def test_8_bit_weights_are_edited_by_the_values_that_they_stand_for(wide, demo_weights, clip):  # noqa: F811
    with torch.inference_mode():
        low = comfy.sd.load_diffusion_model_state_dict(scaled_fp8(demo_weights))
        layers = erased_layers.text_layers(low, 768).tokens
        exact = erased_layers.text_layers(wide.model, 768).tokens
        assert max(relative(layers[name], weight) for name, weight in exact.items()) < 0.05
        found, whole = (erased(model, clip, words("cat", synonyms=(("kitty",),))) for model in (low, wide.model))
    for name, layer in whole.adapter.layers.items():
        assert relative(found.adapter.layers[name].weight_delta(), layer.weight_delta()) < 0.15


def test_the_prompts_prediction_becomes_the_references_and_others_stay(demo, demo_cat):
    adapted = fixed(demo.model, demo_cat, 0.0)

    def prediction(model: Any, prompt: str) -> torch.Tensor:
        return ksampler(model, demo.encode(prompt), demo.encode(""), steps=1, cfg=1.0)

    with torch.inference_mode():
        for prompt, reference in ((CAT, "a photo of the forest"), ("a kitty in the sea", "a photo of the sea")):
            wanted = prediction(demo.model, reference)
            assert relative(prediction(adapted, prompt), wanted) < 0.35 * relative(
                prediction(demo.model, prompt), wanted
            )
        for prompt in ("a photo of the ship", "a photo of the truck"):
            base = prediction(demo.model, prompt)
            assert relative(prediction(adapted, prompt), base) < 0.25 * relative(prediction(adapted, CAT), base)


@pytest.mark.parametrize(("prompt", "detected"), [(CAT, True), ("a kitty in the sea", True), (UNRELATED[0], False)])
def test_its_gate_decides_by_the_text_before_the_first_step(demo, demo_cat, prompt, detected):
    observer = Observer()
    with torch.inference_mode():
        ksampler(guided(demo.model, demo_cat, observer=observer), demo.encode(prompt), demo.encode(""), steps=2)
    assert (observer.decision.stage, observer.decision.detected) == ("text", detected)
    assert observer.cost.total == observer.cost.plain


def test_what_text_cannot_tell_apart_is_said(demo_cat):
    said = concept.separation(demo_cat)
    assert said.startswith("The gate decides by the prompt's text: ")
    content = demo_cat.adapter.card.calibration
    others = {**content["text"]["text"]["others"], "tail": [2.0] * 6}
    text = {**content["text"], "text": {**content["text"]["text"], "others": others}}
    card = replace(demo_cat.adapter.card, calibration={**content, "text": text})
    worse = replace(demo_cat, adapter=replace(demo_cat.adapter, card=card))
    assert concept.separation(worse).startswith("WARNING: by their text the gate cannot tell prompts with 'cat'")


def test_commas_make_a_stack_of_erasure_loras_each_with_its_concept(demo, clip):
    with torch.inference_mode():
        found = node.execute(
            demo.model,
            clip,
            "cat, dog",
            "",
            1.5,
            synonyms="kitty, feline\npuppy",
            scenes="sea",
            shipped_prompts=30,
        )
    loras, report = found.args
    assert [lora.adapter.card.concept for lora in loras] == ["cat", "dog"]
    assert [lora.adapter.card.synonyms for lora in loras] == [("kitty", "feline"), ("puppy",)]
    assert {lora.strength for lora in loras} == {1.5}
    assert all(lora.concept is not None and lora.neutral is not None for lora in loras)
    assert all(lora.adapter.card.settings["evaluations"] == 0 for lora in loras)
    assert "no model evaluation" in report
    assert concept.LIMITS in report


def test_an_empty_reference_becomes_a_scene_that_is_not_the_concept(clip):
    encode = states.States(clip)
    with torch.inference_mode():
        found = concept.neutral_reference(encode, "sea", ())
    assert found in concept.SCENES
    assert found != "sea"


def test_prompts_to_keep_are_encoded_once_for_a_text_encoder(clip):
    encode = states.States(clip)
    with torch.inference_mode():
        first = states.known_states(encode, ("", "a dog"), ("a sheep",))
        before = encode.count
        assert states.known_states(encode, ("", "a dog"), ("a sheep",)) is first
        assert encode.count == before + 2  # two prompts that tell text encoders apart
        assert states.known_states(encode, ("", "a cow"), ("a sheep",)) is not first


def test_too_few_prompts_to_keep_and_no_scenes_are_warned_of(demo, clip):
    with torch.inference_mode():
        _, report = concept.erase_concepts(
            demo.model, clip, words("cat", shipped=0, kept=("", "a dog"), scenes=()), core.ClosedForm()
        )
    assert "WARNING: only 2 prompts are kept" in report
    assert "WARNING: no scenes are named" in report


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"concepts": ()}, "no concept is named"),
        ({"concepts": ("cat", "dog"), "references": ("a", "b", "c")}, "2 concepts and 3 references"),
        ({"concepts": ("cat",), "synonyms": ((), ())}, "1 concepts and 2 lines of synonyms"),
    ],
)
def test_words_that_do_not_fit_together_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        concept.Words(**inputs)


def test_a_prompt_of_several_parts_is_refused(demo):
    with pytest.raises(ValueError, match="2 parts; expected one"):
        states.states_of([*demo.encode("a"), *demo.encode("b")])


def test_strength_and_metadata_travel_to_the_saved_file(demo_cat, tmp_path):
    saved = pack_module("unguide_comfy.lora.save").as_used(replace(demo_cat, strength=2.0))
    formats.save_adapter(saved, tmp_path / "cat.safetensors", "kohya", layout="demo")
    card = formats.load_adapter(tmp_path / "cat.safetensors").card
    assert (card.concept, card.synonyms, card.objective) == ("cat", ("kitty",), "closed form")
    assert (card.target, card.reference) == (CAT, "a photo of the forest")
