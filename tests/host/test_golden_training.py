"""The official trainer's numbers (golden section C): target, loss, gradients, Adam steps and whole iterations.

The core's objective, layers and schedule around the host's own UNet class, in fp32 and with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ops
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import pack_module
from tests.host.conftest import GOLDEN

LIMITS = {"eps": 5e-5, "loss": 1e-5, "gradients, relative": 1e-3, "weights": 1e-6, "z": 1e-3}
LEARNING_RATE, NEGATIVE_GUIDANCE, START_GUIDANCE, STEPS = 3e-5, 2.0, 9.0, 10
TARGET, REFERENCE, EMPTY = "a photo of the cat", "a photo of the forest", ""

Eps = Callable[[Tensor, Tensor, str], Tensor]


@pytest.fixture(autouse=True)
def gradients(inference_mode):
    """Training leaves the inference mode that the host executes nodes under."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def unet(golden_model, manifest, recipe) -> UNetModel:
    """The golden network as a plain module: the host's class, configured as the host detects it, weights frozen."""
    config = {**golden_model.model.model_config.unet_config, "dtype": torch.float32, "device": "cpu"}
    with torch.inference_mode(False):
        network = UNetModel(**config, operations=comfy.ops.disable_weight_init)
        network.load_state_dict(recipe.unet_state_dict(manifest))
        return network.requires_grad_(False)


@pytest.fixture
def eps(unet, manifest, recipe) -> Eps:
    """eps(x, t, prompt): the network's prediction."""
    return lambda x, t, prompt: unet(x, t, recipe.text_context(manifest["salt"], prompt)[None])


@pytest.fixture
def agree() -> Iterator[Callable[[str, Tensor, Tensor, str], None]]:
    """agree(what, found, official, limit): within the named limit; the largest deviations are printed at the end."""
    largest: dict[str, tuple[float, float]] = {}

    def check(what: str, found: Tensor, official: Tensor, limit: str) -> None:
        difference = float((found - official).detach().abs().max())
        if "relative" in limit:
            difference /= float(official.abs().max()) or 1.0
        largest[what] = max((difference, LIMITS[limit]), largest.get(what, (0.0, LIMITS[limit])))
        assert difference <= LIMITS[limit], f"{what}: deviation {difference:.3g}, limit {LIMITS[limit]:.3g}"

    yield check
    for what, (difference, limit) in largest.items():
        print(f"golden C {what}: max abs diff {difference:.3g} (limit {limit:.3g})")


def section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def trainable(parameters: dict[str, Tensor]) -> dict[str, Any]:
    """The low-rank layers that official parameters `<module>.lora.A`, `.lora.B` hold, by module, ready for training."""
    low_rank = pack_module("unguide_core.adapter").LowRank
    modules = [key.removesuffix(".lora.A") for key in parameters if key.endswith(".lora.A")]

    def leaf(key: str) -> Tensor:
        return parameters[key].T.clone().requires_grad_()

    return {module: low_rank(leaf(f"{module}.lora.A"), leaf(f"{module}.lora.B"), 8.0) for module in modules}


def official_names(layers: dict[str, Any], value: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What `value` gives of every trained tensor, under the official name and in the official shape."""
    downs = {f"{module}.lora.A": value(layer.down).T for module, layer in layers.items()}
    return downs | {f"{module}.lora.B": value(layer.up).T for module, layer in layers.items()}


def parameters_of(layers: dict[str, Any]) -> list[Tensor]:
    return [tensor for layer in layers.values() for tensor in (layer.down, layer.up)]


@contextmanager
def adapted(unet: UNetModel, layers: dict[str, Any]) -> Iterator[None]:
    """The network with the layers' deltas added to the outputs of their modules."""
    handles = [
        unet.get_submodule(module).register_forward_hook(lambda _, args, out, layer=layer: out + layer.delta(args[0]))
        for module, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def loss_and_gradients(unet: UNetModel, eps: Eps, layers: dict[str, Any], z: Tensor, t: Tensor, target: Tensor):
    """The adapted prediction for the target prompt and the loss; gradients are left in the layers."""
    with adapted(unet, layers):
        prediction = eps(z, t, TARGET)
    loss = pack_module("unguide_core.objective").erasure_loss(prediction, target)
    loss.backward()
    return prediction.detach(), loss.detach()


def compare_weights(
    agree, layers: dict[str, Any], official: dict[str, Tensor], gradients: dict[str, Tensor], steps: int
):
    """Adam divides by the gradient's size: an element whose gradient is near 0 may go either way, by 2 lr a step."""
    for key, value in official_names(layers, lambda tensor: tensor.detach()).items():
        steady = gradients[key].abs() > 1e-3 * gradients[key].abs().max()
        agree("Adam, weights", torch.where(steady, value, official[key]), official[key], "weights")
        assert float((value - official[key]).abs().max()) <= 2 * LEARNING_RATE * steps


@pytest.mark.parametrize("start", ["init", "warm"])
def test_three_training_steps_are_the_official_ones(unet, eps, agree, start):
    objective = pack_module("unguide_core.objective")
    saved = load_file(GOLDEN / f"c_train_{start}.safetensors")
    z, t = saved["z"], saved["t_enc_ddpm"]
    with torch.no_grad():
        e_0, e_p = eps(z, t, REFERENCE), eps(z, t, TARGET)
    target = objective.erasure_target(e_0, e_p, NEGATIVE_GUIDANCE)
    agree("training, e_0", e_0, saved["e_0"], "eps")
    agree("training, e_p", e_p, saved["e_p"], "eps")
    agree(
        "training, target from saved eps",
        objective.erasure_target(saved["e_0"], saved["e_p"], 2.0),
        saved["target"],
        "eps",
    )
    agree("training, target", target, saved["target"], "eps")

    layers = trainable(section(saved, "init/"))
    optimiser = torch.optim.Adam(parameters_of(layers), lr=LEARNING_RATE)
    for step in range(3):
        optimiser.zero_grad()
        prediction, loss = loss_and_gradients(unet, eps, layers, z, t, target)
        agree("training, e_n", prediction, saved[f"step{step}/e_n"], "eps")
        agree("training, loss", loss[None], saved[f"step{step}/loss"], "loss")
        gradients = official_names(layers, lambda tensor: tensor.grad)
        for key, official in section(saved, f"step{step}/grad/").items():
            agree("training, gradients relative to the largest", gradients[key], official, "gradients, relative")
        optimiser.step()
        compare_weights(agree, layers, section(saved, f"step{step}/after/"), gradients, step + 1)


def test_a_fresh_adapters_first_gradient_reaches_only_up(unet, eps):
    saved = load_file(GOLDEN / "c_train_init.safetensors")
    layers = trainable(section(saved, "init/"))
    loss_and_gradients(unet, eps, layers, saved["z"], saved["t_enc_ddpm"], saved["target"])
    for layer in layers.values():
        assert torch.count_nonzero(layer.up) == 0
        assert torch.count_nonzero(layer.down.grad) == 0
        assert torch.count_nonzero(layer.up.grad) > 0


def sample_z(unet: UNetModel, eps: Eps, layers: dict[str, Any], start_code: Tensor, till_t: int) -> Tensor:
    """The official trainer's latent: from noise, by the model being trained, guided to the target, up to till_t."""
    core, guidance = pack_module("unguide_core.schedule"), pack_module("unguide_core.guidance")
    run, alphas = core.official_run(STEPS, till_t), core.sd_alphas_cumprod()
    sigmas = run.sigmas(alphas)
    timesteps = dict(zip(sigmas.float().tolist(), run.timesteps, strict=False))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma[0].item()
        x_vp, t = core.from_sigma_space(x, level), torch.tensor([timesteps[level]])
        return x - level * guidance.classifier_free(eps(x_vp, t, TARGET), eps(x_vp, t, EMPTY), START_GUIDANCE)

    with torch.no_grad(), adapted(unet, layers):
        z = core.partial_denoise(denoise, core.to_sigma_space(start_code, sigmas[0].item()), sigmas)
    return core.from_sigma_space(z, sigmas[-1].item())


def test_whole_training_iterations_are_the_official_ones(unet, eps, agree, manifest):
    objective = pack_module("unguide_core.objective")
    saved, facts = load_file(GOLDEN / "c_train_main.safetensors"), manifest["train_main"]
    layers = trainable(section(saved, "it0/before/"))
    optimiser = torch.optim.Adam(parameters_of(layers), lr=LEARNING_RATE)
    losses = []
    for number, iteration in enumerate(facts["iterations"]):
        it = section(saved, f"it{number}/")
        z = sample_z(unet, eps, layers, it["start_code"], iteration["t_enc (till_T)"])
        agree("whole iterations, z", z, it["z"], "z")
        with torch.no_grad():
            e_0, e_p = eps(z, it["t_enc_ddpm"], REFERENCE), eps(z, it["t_enc_ddpm"], TARGET)
        optimiser.zero_grad()
        target = objective.erasure_target(e_0, e_p, NEGATIVE_GUIDANCE)
        losses.append(loss_and_gradients(unet, eps, layers, z, it["t_enc_ddpm"], target)[1])
        agree("whole iterations, loss", losses[-1], torch.tensor(iteration["loss_recomputed"]), "loss")
        optimiser.step()
        compare_weights(agree, layers, section(it, "after/"), section(it, "grad/"), number + 1)
    agree(
        "whole iterations, average loss",
        torch.stack(losses).mean(),
        torch.tensor(facts["official_average_loss"]),
        "loss",
    )


def test_the_trained_adapter_equals_the_official_file():
    saved = section(load_file(GOLDEN / "c_train_main.safetensors"), "it2/after/")
    adapter = pack_module("unguide_core.formats").load_adapter(GOLDEN / "c_train_main_lora.pth")
    assert len(adapter.layers) == len(saved) / 2
    for module, layer in trainable(saved).items():
        loaded = adapter.layers[f"diffusion_model.{module}"]
        assert torch.equal(loaded.down, layer.down)
        assert torch.equal(loaded.up, layer.up)
        assert loaded.scale == layer.scale == 8.0
