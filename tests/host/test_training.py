"""Training an erasure LoRA on a loaded model: what it gives, what it leaves alone, how it stops."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import pack_module
from tests.host.conftest import GOLDEN, conditioning, fixed, ksampler, trained_adapter

core, texts, recipes, rollout = (
    pack_module(f"unguide_core.training.{name}") for name in ("trainer", "prompts", "recipe", "rollout")
)
jobs, finishes, predictors, shows = (
    pack_module(f"unguide_comfy.train.{name}") for name in ("job", "finish", "predictor", "show")
)
Card = pack_module("unguide_core.adapter").Card
node = pack_module("nodes.train").TrainErasureLora

TARGET, REFERENCE, EMPTY = "a photo of the cat", "a photo of the forest", ""
PROMPTS = texts.TrainingPrompts((texts.Pair(TARGET, REFERENCE),), ("", "a photo of the dog"), EMPTY)
QUICK = replace(
    recipes.PRESETS["selective"],
    iterations=4,
    schedule_steps=2,
    trajectories=2,
    kept_trajectories=2,
    batch=1,
    preserved=1,
    refresh=4,
    check=2,
)
LIMITS = {"loss": 1e-5, "weights": 1e-6}


def sums(module: torch.nn.Module) -> dict[str, str]:
    """A digest of every weight's and buffer's bytes."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: digest(tensor) for name, tensor in tensors.items() if tensor.numel()}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(
        tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


@pytest.fixture(scope="module")
def job(demo):
    conditionings = {name: demo.encode(name) for name in PROMPTS.names}
    return jobs.Job(QUICK, PROMPTS, conditionings, Card(concept="cat", target=TARGET, reference=REFERENCE))


@pytest.fixture
def latent() -> Tensor:
    return torch.zeros(1, 4, 8, 8)


@pytest.fixture(scope="module")
def trained(demo, job):
    with torch.inference_mode():
        return trained_adapter(demo.model, job, torch.zeros(1, 4, 8, 8))


def test_the_base_is_bit_identical_afterwards_and_its_weights_are_the_same_objects(demo, job, latent):
    before, objects = sums(demo.model.model), {n: id(p) for n, p in demo.model.model.named_parameters()}
    forwards = [name for name, m in demo.model.model.named_modules() if "forward" in m.__dict__]
    gradients = {n: p.requires_grad for n, p in demo.model.model.named_parameters()}  # some hosts leave them on
    trained_adapter(demo.model, job, latent)
    assert sums(demo.model.model) == before
    assert {n: id(p) for n, p in demo.model.model.named_parameters()} == objects
    assert [name for name, m in demo.model.model.named_modules() if "forward" in m.__dict__] == forwards
    assert {n: p.requires_grad for n, p in demo.model.model.named_parameters()} == gradients
    assert not any(parameter.grad is not None for parameter in demo.model.model.parameters())


def test_the_adapter_is_float32_has_learnt_and_names_the_models_own_layers(demo, trained):
    layers = trained.adapter.layers
    assert set(layers) == {
        name.removesuffix(".weight")
        for name in demo.model.model.state_dict()
        if name.endswith(("2.to_k.weight", "2.to_v.weight"))
    }
    for layer in layers.values():
        assert layer.down.dtype == layer.up.dtype == torch.float32
        assert torch.count_nonzero(layer.up) > 0
        assert not layer.up.requires_grad
    assert len(trained.losses) == QUICK.iterations
    assert len(trained.held_out) == 2


def test_the_card_says_what_was_trained_and_how(demo, trained):
    card = trained.adapter.card
    assert (card.concept, card.target, card.reference, card.neutral) == ("cat", TARGET, REFERENCE, EMPTY)
    assert (card.rank, card.alpha, card.base_model) == (8, 64.0, "SD15")
    assert card.settings["iterations"] == 4
    assert card.settings["loop"] == "selective"
    weights = [w for n, w in demo.model.model.state_dict().items() if n.startswith("diffusion_model.")]
    assert card.base_hash == pack_module("unguide_core.adapter.lowrank").weights_hash(weights)


def test_the_same_seed_trains_the_same_adapter_and_another_seed_another(demo, job, trained, latent):
    again = trained_adapter(demo.model, job, latent)
    other = trained_adapter(demo.model, replace(job, recipe=replace(QUICK, seed=1)), latent)
    assert again.adapter.fingerprint == trained.adapter.fingerprint
    assert other.adapter.fingerprint != trained.adapter.fingerprint


def test_a_model_with_a_gate_is_trained_as_its_base(demo, demo_lora, job, trained, latent):
    gated = fixed(demo.model, demo_lora, 0.0)
    assert trained_adapter(gated, job, latent).adapter.fingerprint == trained.adapter.fingerprint


def test_checkpointing_computes_the_same_adapter(demo, job, trained, latent, monkeypatch):
    forwards = [n for n, m in demo.model.model.named_modules() if "forward" in m.__dict__]
    plain = predictors.HostPredictor.__init__

    def checkpointing(self, *args: Any) -> None:
        plain(self, *args)
        self.checkpointing = True

    monkeypatch.setattr(predictors.HostPredictor, "__init__", checkpointing)
    again = trained_adapter(demo.model, job, latent)
    for name, layer in trained.adapter.layers.items():
        torch.testing.assert_close(again.adapter.layers[name].up, layer.up, rtol=1e-3, atol=1e-6)
    assert [n for n, m in demo.model.model.named_modules() if "forward" in m.__dict__] == forwards


def test_out_of_memory_turns_checkpointing_on_and_says_so(demo, job, trained, latent, monkeypatch):
    whole, raised = predictors.HostPredictor.__call__, []

    def scarce(self, z: Tensor, timesteps: Tensor, prompts: tuple[str, ...]) -> Tensor:
        if torch.is_grad_enabled() and self.adapting and not self.checkpointing:
            raised.append(len(prompts))
            raise torch.OutOfMemoryError("no room")
        return whole(self, z, timesteps, prompts)

    monkeypatch.setattr(predictors.HostPredictor, "__call__", scarce)
    reports: list[Any] = []
    again = trained_adapter(demo.model, job, latent, reports.append)
    assert len(raised) == 1
    assert "gradient checkpointing" in reports[0].text
    assert list(again.losses) == pytest.approx(list(trained.losses), rel=1e-3)


def interrupting(at: int) -> Any:
    """An observer that presses Cancel after an iteration."""

    def observe(report: Any) -> None:
        if report.progress.iteration == at:
            comfy.model_management.interrupt_current_processing()

    return observe


def test_cancelling_ends_the_run_and_leaves_the_model_clean(demo, job, latent):
    forwards = [n for n, m in demo.model.model.named_modules() if "forward" in m.__dict__]
    before = sums(demo.model.model)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        trained_adapter(demo.model, job, latent, interrupting(2))
    assert not comfy.model_management.processing_interrupted()
    assert sums(demo.model.model) == before
    assert [n for n, m in demo.model.model.named_modules() if "forward" in m.__dict__] == forwards


def test_cancelling_keeps_the_adapter_so_far_where_that_was_asked_for(demo, job, latent):
    kept = trained_adapter(demo.model, replace(job, on_cancel="keep"), latent, interrupting(2))
    assert len(kept.losses) == 2
    assert kept.adapter.card.settings["iterations"] == 2
    assert kept.adapter.card.settings["asked_iterations"] == 4
    assert not comfy.model_management.processing_interrupted()


def test_a_learning_rate_that_diverges_stops_with_a_sentence_and_a_clean_model(demo, job, latent):
    forwards = [n for n, m in demo.model.model.named_modules() if "forward" in m.__dict__]
    wild = replace(job, recipe=replace(QUICK, iterations=40, rate_down=1e8, rate_up=1e8))
    with pytest.raises(core.TrainingError, match=r"training diverged at iteration \d+.*lower them"):
        trained_adapter(demo.model, wild, latent)
    assert [n for n, m in demo.model.model.named_modules() if "forward" in m.__dict__] == forwards


def test_previews_are_sent_to_the_page_every_n_iterations_and_at_the_end(demo, job, latent, monkeypatch):
    """Beside the loss, by the host's own progress bar, whether its samplers show previews or not."""
    import comfy.utils

    sent: list[tuple[int, Any]] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: sent.append((value, preview))
    )
    monkeypatch.setattr(shows, "EVERY", 1e9)
    previewed = replace(job, recipe=replace(QUICK, iterations=5, refresh=5, check=0), preview_every=2)
    trained_adapter(demo.model, previewed, latent, shows.TrainingDisplay(demo.model))
    images = {value: preview[1] for value, preview in sent if preview is not None}
    assert list(images) == [2, 4, 5]
    side = shows.SIDE
    assert {image.size for image in images.values()} == {(2 * side, side)}
    assert len({image.crop((0, 0, side, side)).tobytes() for image in images.values()}) == 3
    assert len({image.crop((side, 0, 2 * side, side)).tobytes() for image in images.values()}) == 3


def test_the_loss_is_shown_at_once_without_a_preview(demo, job, latent, monkeypatch):
    import comfy.utils

    sent: list[Any] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: sent.append(preview))
    trained_adapter(demo.model, job, latent, shows.TrainingDisplay(demo.model))
    assert sent[0][1].size == (shows.SIDE, shows.SIDE)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The lines that a training puts on its node."""
    lines: list[str] = []
    for module in (finishes, jobs, shows, pack_module("unguide_comfy.report.progress")):
        monkeypatch.setattr(module, "say", lines.append)
    return lines


@pytest.mark.parametrize(
    ("on_cancel", "words"),
    [("discard", "nothing is kept (on_cancel is 'discard')"), ("keep", "the LoRA as trained so far is kept")],
)
def test_the_node_says_what_a_cancelled_training_kept(demo, job, latent, said, on_cancel, words):
    with contextlib.suppress(comfy.model_management.InterruptProcessingException):
        trained_adapter(demo.model, replace(job, on_cancel=on_cancel), latent, interrupting(2))
    assert said == [f"Cancelled at iteration 2 of 4: {words}"]


@pytest.fixture
def demo_weights() -> dict[str, Tensor]:
    """The weights of the demo's UNet, under their names in the checkpoint file."""
    import folder_paths

    path = folder_paths.get_full_path_or_raise("checkpoints", "unguide-demo.safetensors")
    return {k: v for k, v in load_file(path).items() if k.startswith("model.diffusion_model.")}


def scaled_fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as a quantised checkpoint has them: linear layers in fp8, each with a scale."""
    prefix = "model.diffusion_model."
    quantised = {**weights, f"{prefix}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, weight in weights.items():
        if weight.ndim == 2 and ".transformer_blocks." in name:
            scale = weight.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
            quantised[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            quantised[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    return quantised


def test_a_quantised_model_is_trained_on_and_stays_as_it_is(demo_weights, job, trained, latent):
    model = comfy.sd.load_diffusion_model_state_dict(scaled_fp8(demo_weights))
    layer = model.model.get_submodule(next(iter(trained.adapter.layers)))
    assert layer.weight.is_inference()
    assert type(layer.weight) is not torch.nn.Parameter
    before = {name: digest(weight) for name, weight in model.model.state_dict().items()}
    low = trained_adapter(model, job, latent)
    assert {name: digest(weight) for name, weight in model.model.state_dict().items()} == before
    assert list(low.losses) == pytest.approx(list(trained.losses), rel=0.25)
    assert all(torch.count_nonzero(layer.up) for layer in low.adapter.layers.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_model_in_low_precision_trains_a_float32_adapter_and_stays(demo_weights, job, trained, latent, dtype):
    model = comfy.sd.load_diffusion_model_state_dict(demo_weights, model_options={"dtype": dtype})
    before = sums(model.model)
    low = trained_adapter(model, job, latent)
    assert sums(model.model) == before
    assert {layer.up.dtype for layer in low.adapter.layers.values()} == {torch.float32}
    assert list(low.losses) == pytest.approx(list(trained.losses), rel=0.25)


# ---------------------------------------------------------------- the official loop


@pytest.fixture(scope="module")
def golden_job(manifest, recipe):
    conditionings = {
        name: conditioning(recipe.text_context(manifest["salt"], name)) for name in (TARGET, REFERENCE, EMPTY)
    }
    prompts = texts.TrainingPrompts((texts.Pair(TARGET, REFERENCE),), (), EMPTY)
    paper = replace(recipes.PRESETS["paper"], schedule_steps=10, iterations=3)
    return jobs.Job(paper, prompts, conditionings, Card())


@pytest.fixture
def golden_start(monkeypatch, manifest) -> Iterator[dict[str, Tensor]]:
    """The official trainer's first parameters and random numbers, in place of those of a seed."""
    saved = load_file(GOLDEN / "c_train_main.safetensors")
    low_rank = pack_module("unguide_core.adapter").LowRank

    def start(*arguments: Any) -> dict[str, Any]:
        modules = [
            k.removesuffix(".lora.A").removeprefix("it0/before/")
            for k in saved
            if k.startswith("it0/before/") and k.endswith("A")
        ]
        return {
            f"diffusion_model.{m}": low_rank(
                saved[f"it0/before/{m}.lora.A"].T.clone().requires_grad_(),
                saved[f"it0/before/{m}.lora.B"].T.clone().requires_grad_(),
                8.0,
            )
            for m in modules
        }

    draws = [
        rollout.Draw(it["t_enc (till_T)"], int(saved[f"it{n}/t_enc_ddpm"]), saved[f"it{n}/start_code"])
        for n, it in enumerate(manifest["train_main"]["iterations"])
    ]
    plain = core.Training.__init__
    monkeypatch.setattr(jobs, "trainable_layers", start)
    monkeypatch.setattr(core.Training, "__init__", lambda self, *a, **k: plain(self, *a, **k, draws=iter(draws)))
    return saved


def test_the_official_loop_in_the_host_is_the_official_trainer(golden_model, golden_job, golden_start, manifest):
    """Whole iterations: latents sampled by the adapted model, targets, losses, gradients, Adam."""
    saved, facts = golden_start, manifest["train_main"]
    found = trained_adapter(golden_model, golden_job, torch.zeros_like(saved["it0/start_code"]))
    for loss, iteration in zip(found.losses, facts["iterations"], strict=True):
        print(
            f"golden C, host's trainer, loss: {abs(loss - iteration['loss_recomputed']):.2e} (limit {LIMITS['loss']})"
        )
        assert abs(loss - iteration["loss_recomputed"]) <= LIMITS["loss"]
    for name, layer in found.adapter.layers.items():
        module = name.removeprefix("diffusion_model.")
        for factor, value in (("A", layer.down.T), ("B", layer.up.T)):
            key = f"{module}.lora.{factor}"
            official, gradient = saved[f"it2/after/{key}"], saved[f"it2/grad/{key}"]
            steady = gradient.abs() > 1e-3 * gradient.abs().max()
            assert float((value - official)[steady].abs().max()) <= LIMITS["weights"]
            assert float((value - official).abs().max()) <= 2 * 3e-5 * 3


# ---------------------------------------------------------------- the node


WORDS = {"concept": "cat", "generate_instead": "forest", "synonyms": "kitty"}
FEW = {"sampling_steps": 2, "scenes": "", "keep_prompts": "\na photo of the dog"}
WIDGETS = {"preset": "selective", "layers": "object", "iterations": 2, "learning_rate": 0.0, "seed": 0}


@pytest.fixture
def few_prompts(monkeypatch):
    """Calibrations on few prompts: what they cost is per prompt."""
    prompts = finishes.calibration_prompts

    def few(*arguments: Any) -> tuple[list[str], list[str]]:
        own, others = prompts(*arguments)
        return own[:1], others[:8]

    monkeypatch.setattr(finishes, "calibration_prompts", few)
    monkeypatch.setattr(finishes, "text_calibration_prompts", few)


def require_counts(said: list[str]) -> None:
    """The node counted what comes before and after the training, and said at the end what there is."""
    counted = [(line.split(":")[0], re.search(r": (\d+) of (\d+); \d+ s left$", line)) for line in said]
    steps = dict.fromkeys(what for what, numbers in counted if numbers)
    assert list(steps) == [
        "Encoding prompts",
        "Generating latents to train at",
        "Calibrating the gate, prompts",
        "Calibrating the gate, prompts for images",
    ]
    for step in steps:
        numbers = [tuple(map(int, found.groups())) for what, found in counted if what == step and found]
        (total,) = {total for _, total in numbers}
        assert [done for done, _ in numbers] == sorted(done for done, _ in numbers)
        assert numbers[-1][0] == total > 1
    assert re.match(r"Trained: \d+ of \d+ iterations, loss 0\.\d{4}; calibrated$", said[-1])


def test_the_node_gives_an_erasure_lora_that_the_sampler_takes_and_the_hosts_loss_map(demo, latent, few_prompts, said):
    from comfy_extras.nodes_train import LossGraphNode

    out = node.execute(demo.model, {"samples": latent}, **WORDS, **WIDGETS, **FEW, clip=demo.clip)
    (lora,), losses = out.args
    require_counts(said)
    assert len(out.ui.as_dict()["images"]) == 1
    assert len(losses["loss"]) == 2
    assert lora.concept_prompt == "a photo of the cat"
    card = lora.adapter.card
    assert (card.concept, card.synonyms, card.objective) == ("cat", ("kitty",), "selective")
    assert card.calibration["latent"] == (4, 8, 8)
    level = card.calibration["levels"]["influence"][0]
    assert level["others"]["count"] == 8
    assert level["baseline"] > 0
    assert card.calibration["text"]["text"]["others"]["count"] == 8
    image = ksampler(fixed(demo.model, lora, 0.0), demo.encode(TARGET), demo.encode(""), steps=2)
    assert image.isfinite().all()
    assert LossGraphNode.define_schema().inputs[0].io_type == "LOSS_MAP"
    json.dumps(losses)


def test_the_node_trains_on_connected_prompts_without_a_clip(demo, latent):
    given = {"target": TARGET, "reference_prompt": REFERENCE, "neutral": EMPTY}
    out = node.execute(
        demo.model,
        {"samples": latent},
        **{**WORDS, "concept": "", "generate_instead": "", "synonyms": ""},
        **WIDGETS,
        sampling_steps=2,
        **{name: demo.encode(prompt) for name, prompt in given.items()},
    )
    (lora,), _ = out.args
    assert lora.name == "trained here"
    assert lora.concept is not None
    card = lora.adapter.card
    assert (card.target, card.reference, lora.concept_prompt) == ("", "", "")
    assert card.calibration == {}


def test_training_in_the_papers_way_on_connected_prompts_ends_with_a_calibration_too(demo, latent, few_prompts):
    changes = {"preset": "paper", "sampling_steps": 10}
    connected = {"target": TARGET, "reference_prompt": REFERENCE, "neutral": EMPTY}
    given = {name: demo.encode(prompt) for name, prompt in connected.items()}
    out = node.execute(
        demo.model, {"samples": latent}, **{**WORDS, **WIDGETS, **FEW, **changes, **given}, clip=demo.clip
    )
    (lora,), _ = out.args
    level = lora.adapter.card.calibration["levels"]["influence"][0]
    assert level["others"]["count"] == 8
    assert level["baseline"] > 0
    assert lora.adapter.card.calibration["text"] is None  # no other prompt with the concept is known
    assert (lora.concept_prompt, lora.adapter.card.reference) == (TARGET, REFERENCE)


def test_prompts_to_calibrate_with_are_half_kept_and_half_unseen_and_name_no_concept():
    prompts = pack_module("unguide_core.training.prompts")
    words = prompts.prompts_for("dog", "forest", ("puppy",))
    own, others = prompts.calibration_prompts(words, ("dog", "puppy"))
    assert 8 <= len(own) <= 14
    assert len(set(others)) == len(others) >= 24
    assert len(set(others) & set(words.kept)) >= 12
    assert len(set(others) - set(words.kept)) >= 10
    assert not any(prompts.names_a_word(prompt, ("dog", "puppy")) for prompt in others)
    assert prompts.calibration_prompts(None, ()) == ([], [])


def test_the_text_stage_is_calibrated_with_all_of_them():
    prompts = pack_module("unguide_core.training.prompts")
    words = prompts.prompts_for("dog", "forest", ("puppy",))
    own, others = prompts.text_calibration_prompts(words, ("dog", "puppy"))
    few_own, few_others = prompts.calibration_prompts(words, ("dog", "puppy"))
    assert own == [pair.target for pair in words.erased[1:]]
    assert set(few_own) < set(own)
    assert set(few_others) < set(others)
    assert set(others) >= set(words.kept)


def failing(error: Exception) -> Any:
    def calibrated(*args: Any) -> Any:
        raise error

    return calibrated


def test_what_was_trained_is_not_lost_with_its_calibration(demo, job, latent, monkeypatch, caplog):
    """One training, finished three times."""
    done = jobs.train(demo.model, job, latent)
    monkeypatch.setattr(finishes, "train", lambda *arguments: done)
    inputs = {**WORDS, **WIDGETS, **FEW, "clip": demo.clip}
    monkeypatch.setattr(finishes, "calibrate", failing(torch.OutOfMemoryError("no room")))
    (lora,), _ = node.execute(demo.model, {"samples": latent}, **inputs).args
    assert lora.adapter.card.calibration == {}
    assert "is trained, but not calibrated (no room); use Calibrate Erasure LoRA" in caplog.text
    interrupt = comfy.model_management.InterruptProcessingException()
    monkeypatch.setattr(finishes, "calibrate", failing(interrupt))
    (lora,), _ = node.execute(demo.model, {"samples": latent}, **inputs, on_cancel="keep").args
    assert lora.adapter.card.calibration == {}
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        node.execute(demo.model, {"samples": latent}, **inputs)


def test_reports_say_what_is_left_from_the_second_iteration_on(demo, job, latent):
    reports: list[Any] = []
    trained_adapter(demo.model, job, latent, reports.append)
    assert "left" not in reports[0].text
    assert reports[1].left > 0
    assert reports[1].text.endswith("s left")
    assert reports[-1].left == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concept": ""}, "no concept is named"),
        ({"generate_instead": ""}, "no reference"),
        ({"generate_instead": "cat"}, "nothing to learn"),
        ({"layers": "custom"}, "pattern is empty"),
        ({"layers": "custom", "layer_pattern": "nowhere"}, "matches none of this model's"),
        ({"clip": None}, "no CLIP is connected"),
        ({"clip": None, "target": [[torch.zeros(1, 77, 768), {}]]}, "reference_prompt, neutral"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(demo, latent, changes, words):
    inputs = {**WORDS, **WIDGETS, **FEW, "clip": demo.clip, **changes}
    with pytest.raises(ValueError, match=words):
        node.execute(demo.model, {"samples": latent}, **inputs)


def test_two_equal_conditionings_are_refused(demo, latent):
    same = demo.encode(TARGET)
    with pytest.raises(ValueError, match="the same prompt"):
        node.execute(
            demo.model, {"samples": latent}, **WORDS, **WIDGETS, target=same, reference_prompt=same, neutral=same
        )


def test_a_model_without_discrete_timesteps_is_refused(demo, job, latent):
    import comfy.model_sampling

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    model = demo.model.clone()
    model.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match="1000 discrete timesteps"):
        trained_adapter(model, job, latent)
