"""Files that are well-formed and still no adapter that can be used: rewritten bases, absurd scales, endless texts."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file

from unguide_core.formats import AdapterError, load_adapter

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


class Network(torch.nn.Module):
    """A network with one layer of a UNet's name."""

    def __init__(self) -> None:
        super().__init__()
        module: torch.nn.Module = self
        *parents, last = PATH.split(".")
        for name in parents:
            module.add_module(name, torch.nn.Module())
            module = module.get_submodule(name)
        torch.manual_seed(3)
        module.add_module(last, torch.nn.Linear(12, 8, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(PATH)(x)


def trained(start: object, folder: Path) -> tuple[torch.Tensor, peft.PeftModel, Path]:
    """The base model's weight before anything, a peft model after some training, and its initial adapter's folder."""
    network = Network()
    weight = network.get_submodule(PATH).weight.detach().clone()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_k"], init_lora_weights=start)
    model = peft.get_peft_model(network, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "initial")
    model.peft_config["default"].init_lora_weights = start
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(4, 12)).square().mean().backward()
        optimizer.step()
    return weight, model, folder / "initial"


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_rewrote_the_base_model_is_refused_with_the_remedy(start, tmp_path):
    _, model, _ = trained(start, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=f"init_lora_weights '{start}'.*path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_remedy_gives_an_adapter_that_predicts_what_peft_predicts(start, tmp_path):
    weight, model, initial = trained(start, tmp_path)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(initial))
    (layer,) = load_adapter(tmp_path / "adapter").layers.values()
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    same = trained(start, tmp_path / "again")[1]  # the conversion has changed the first
    with torch.no_grad():
        expected = same(x)
    assert torch.allclose(x @ weight.T + layer.delta(x).detach(), expected, atol=1e-5)


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_initialisations_that_keep_the_base_model_are_read(start, tmp_path):
    weight, model, _ = trained(start, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    (layer,) = load_adapter(tmp_path / "adapter").layers.values()
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(x @ weight.T + layer.delta(x), model(x), atol=1e-5)


def saved(path: Path, alpha: float = 1.0, **metadata: str) -> Path:
    stem = f"lora_unet_{PATH.replace('.', '_')}"
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(1, 12),
        f"{stem}.lora_up.weight": torch.ones(8, 1),
        f"{stem}.alpha": torch.tensor(alpha),
    }
    save_file(tensors, path, {f"unguide.{name}": text for name, text in metadata.items()})
    return path


def test_a_finite_alpha_that_no_model_survives_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match=r"can change a weight by 3e\+38.*its alpha is wrong"):
        load_adapter(saved(tmp_path / "a.safetensors", alpha=3e38))
    with pytest.raises(AdapterError, match="its alpha is wrong"):
        load_adapter(saved(tmp_path / "b.safetensors"), alpha=1e30)


@pytest.mark.parametrize("field", ["concept", "target", "reference", "neutral", "synonyms"])
def test_a_prompt_in_the_metadata_is_bounded(field, tmp_path):
    text = "cat " * 20_000
    content = json.dumps([text]) if field == "synonyms" else text
    with pytest.raises(AdapterError, match="a prompt of 80000 characters; expected 4000 at most"):
        load_adapter(saved(tmp_path / "long.safetensors", **{field: content}))


def test_a_file_of_too_many_tensors_is_refused_before_they_are_read(tmp_path):
    path = tmp_path / "many.safetensors"
    save_file({f"a{i}": torch.zeros(1) for i in range(20_001)}, path)
    with pytest.raises(AdapterError, match="it holds 20001 tensors; expected 20000 at most"):
        load_adapter(path)
