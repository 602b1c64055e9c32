"""Files of LyCORIS and PEFT that hold no two matrices: each layer becomes a low-rank one that changes the weight alike.

tests/fixtures/lycoris holds what LyCORIS itself wrote and computed, made by the script there; PEFT is at hand.
"""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unguide_core.adapter.formats.cli import main
from unguide_core.formats import AdapterError, load_adapter, save_adapter

LYCORIS = Path(__file__).parents[1] / "fixtures" / "lycoris"
LIMIT = 1e-5
LINEAR, CONVOLUTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.0.resnets.0.conv1"
STEM, STEM_OF_CONVOLUTION = (f"lora_unet_{path.replace('.', '_')}" for path in (LINEAR, CONVOLUTION))
KINDS = sorted(path.stem for path in LYCORIS.glob("*.safetensors"))
ON_THE_MODEL = ("boft", "dora", "glora", "oft")
"""What the kinds begin with whose change depends on the model's weight."""


class Made:
    """One file of the fixtures: the adapter as LyCORIS wrote it, the base model's weights, inputs and outputs."""

    def __init__(self, kind: str, folder: Path):
        tensors = load_file(LYCORIS / f"{kind}.safetensors")
        self.path, self.tensors = folder / f"{kind}.safetensors", tensors
        save_file({k.removeprefix("adapter."): t for k, t in tensors.items() if k.startswith("adapter.")}, self.path)

    def base(self, name: str) -> Tensor | None:
        """The base model's parameters, as a host's model gives them by kohya's names."""
        layer, _, kind = name.rpartition(".")
        path = {STEM: LINEAR, STEM_OF_CONVOLUTION: CONVOLUTION}.get(layer)
        return self.tensors.get(f"base.{path}.{kind}")

    def deviation(self, layer, path: str) -> float:
        """||ours - LyCORIS'|| / ||LyCORIS' - base||, of the outputs."""
        weight, bias, x = (
            self.tensors[f"{part}.{path}{end}"] for part, end in (("base", ".weight"), ("base", ".bias"), ("input", ""))
        )
        layer = layer.reshaped(weight.shape)
        if weight.ndim == 2:
            before, delta = torch.nn.functional.linear(x, weight, bias), layer.delta(x)
        else:
            before, delta = torch.nn.functional.conv2d(x, weight, bias, padding=1), layer.delta(x, padding=1)
        change = self.tensors[f"output.{path}"] - before
        assert change.norm() > 1e-2 * before.norm()
        return ((delta - change).norm() / change.norm()).item()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora_rows"])
def test_a_file_of_lycoris_predicts_what_lycoris_predicts(kind, tmp_path):
    made = Made(kind, tmp_path)
    adapter = load_adapter(made.path, base=made.base)
    assert set(adapter.layers) == {STEM, STEM_OF_CONVOLUTION}
    assert adapter.card.source_format == "kohya"
    for stem, path in ((STEM, LINEAR), (STEM_OF_CONVOLUTION, CONVOLUTION)):
        assert made.deviation(adapter.layers[stem], path) < LIMIT


def test_dora_by_rows_is_normed_as_comfyui_does_it_and_not_as_lycoris(tmp_path):
    """ComfyUI divides by the norm of W's rows, LyCORIS by that of the adapted ones."""
    made = Made("dora_rows", tmp_path)
    adapter = load_adapter(made.path, base=made.base)
    for stem, path in ((STEM, LINEAR), (STEM_OF_CONVOLUTION, CONVOLUTION)):
        weight, parts = (
            made.base(f"{stem}.weight"),
            {k: made.tensors[f"adapter.{stem}.{k}"] for k in ("dora_scale", "alpha")},
        )
        down, up = (made.tensors[f"adapter.{stem}.lora_{side}.weight"] for side in ("down", "up"))
        adapted = weight + (parts["alpha"] / 2 * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        norm = weight.flatten(1).norm(dim=1).reshape(parts["dora_scale"].shape)
        expected = adapted * parts["dora_scale"] / norm - weight
        change = adapter.layers[stem].weight_delta().reshape(weight.shape)
        assert (change - expected).norm() < LIMIT * expected.norm()
        assert made.deviation(adapter.layers[stem], path) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_what_depends_on_the_model_asks_for_it_and_nothing_else_does(kind, tmp_path):
    made = Made(kind, tmp_path)
    if not kind.startswith(ON_THE_MODEL):
        assert len(load_adapter(made.path).layers) == 2
        return
    with pytest.raises(AdapterError, match=r"depends on the model's own weight; connect the model"):
        load_adapter(made.path)
    with pytest.raises(AdapterError, match="has no counterpart in the connected model"):
        load_adapter(made.path, base=lambda name: None)
    found = load_adapter(made.path, base=lambda n: made.base(n) if n.startswith(STEM + ".") else None, partial=True)
    assert list(found.layers) == [STEM]
    assert any("1 layers without a counterpart in the model were left out" in note for note in found.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_composed_layer_is_saved_as_an_ordinary_lora(kind, tmp_path):
    made = Made(kind, tmp_path)
    adapter = load_adapter(made.path, base=made.base)
    save_adapter(adapter, tmp_path / "saved.safetensors", "kohya")
    assert load_adapter(tmp_path / "saved.safetensors").fingerprint == adapter.fingerprint


def test_the_command_line_converts_what_depends_on_the_model_beside_the_models_file(tmp_path):
    made = Made("oft", tmp_path)
    base = {f"{path}.weight": made.tensors[f"base.{path}.weight"] for path in (LINEAR, CONVOLUTION)}
    save_file(base, tmp_path / "base.safetensors")
    arguments = ["convert", str(made.path), str(tmp_path / "lora.safetensors"), "--format", "kohya"]
    assert main(arguments) == 2
    assert main([*arguments, "--base", str(tmp_path / "base.safetensors")]) == 0
    expected = load_adapter(made.path, base=made.base)
    assert load_adapter(tmp_path / "lora.safetensors").fingerprint == expected.fingerprint


def test_ranks_are_the_products_of_the_factors_ranks_up_to_the_weights_own(tmp_path):
    ranks = {}
    for kind in ("loha", "loha_full", "lokr", "glora"):
        made = Made(kind, tmp_path)
        ranks[kind] = [layer.rank for layer in load_adapter(made.path, base=made.base).layers.values()]
    assert ranks["loha"] == [4, 4]
    assert ranks["loha_full"] == [12, 16]
    assert ranks["lokr"][0] == 3 * 1
    assert ranks["glora"][0] == 2 * 2


def test_a_rotation_with_a_constraint_that_programs_read_differently_is_refused(tmp_path):
    made = Made("oft", tmp_path)
    tensors = load_file(made.path)
    tensors[f"{STEM}.alpha"] = torch.tensor(0.01)
    save_file(tensors, made.path)
    with pytest.raises(AdapterError, match=r"constrained \(alpha 0.01\).*convert it to a LoRA"):
        load_adapter(made.path, base=made.base)


def test_an_alpha_for_layers_that_have_none_is_refused(tmp_path):
    made = Made("oft", tmp_path)
    with pytest.raises(AdapterError, match=r"has no alpha, and alpha 2.0 was asked for"):
        load_adapter(made.path, base=made.base, alpha=2.0)


@pytest.mark.parametrize(
    ("kind", "part"),
    [("loha", "hada_w2_b"), ("lokr_both", "lokr_w1_a"), ("glora", "b1.weight"), ("dora_columns", "lora_up.weight")],
)
def test_a_layer_that_lacks_a_part_is_refused(kind, part, tmp_path):
    made = Made(kind, tmp_path)
    tensors = load_file(made.path)
    del tensors[f"{STEM}.{part}"]
    save_file(tensors, made.path)
    with pytest.raises(AdapterError, match="incomplete"):
        load_adapter(made.path, base=made.base)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_other_shapes_or_values_are_refused_with_the_layers_name(kind, tmp_path):
    made = Made(kind, tmp_path)
    tensors = load_file(made.path)
    for key in sorted(tensors):
        if not key.startswith(STEM + ".") or key.endswith(("alpha", "lokr_w1", "lokr_w2")):
            continue
        for changed in (torch.cat([tensors[key]] * 2), tensors[key] * float("nan")):
            save_file({**tensors, key: changed.contiguous()}, made.path)
            with pytest.raises(ValueError, match=f"{STEM}|changes a weight of shape"):
                load_adapter(made.path, base=made.base).layers[STEM].reshaped(made.base(f"{STEM}.weight").shape)


def test_a_small_file_that_would_become_a_huge_layer_is_refused(tmp_path):
    path = tmp_path / "huge.safetensors"
    save_file({f"{STEM}.lokr_w1": torch.ones(1000, 1000), f"{STEM}.lokr_w2": torch.ones(500, 500)}, path)
    with pytest.raises(AdapterError, match="would become a layer of rank 500000"):
        load_adapter(path)


# PEFT


class Network(torch.nn.Module):
    """A network of one linear layer and one convolution, with a UNet's names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        for path, layer in ((LINEAR, torch.nn.Linear(12, 16)), (CONVOLUTION, torch.nn.Conv2d(8, 16, 3, padding=1))):
            module: torch.nn.Module = self
            *parents, last = path.split(".")
            for name in parents:
                if name not in dict(module.named_children()):
                    module.add_module(name, torch.nn.Module())
                module = module.get_submodule(name)
            module.add_module(last, layer)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.get_submodule(LINEAR)(x), self.get_submodule(CONVOLUTION)(image)


TARGETS = ["to_k", "conv1"]
CONFIGS = {
    "DoRA": peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, use_dora=True),
    "DoRA, patterns": peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=TARGETS,
        use_dora=True,
        rank_pattern={"to_k": 3},
        alpha_pattern={"to_k": 5},
        use_rslora=True,
    ),
    "LoHa": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "LoHa, tucker": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=1, alpha=3, target_modules=TARGETS, decompose_both=True),
    "LoKr, tucker": peft.LoKrConfig(r=1, alpha=3, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr, whole": peft.LoKrConfig(r=16, alpha=3, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_that_peft_saved_predicts_what_peft_predicts(kind, tmp_path):
    base = Network()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.get_peft_model(base, CONFIGS[kind])
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", base=lambda name: weights.get(name.removeprefix("unet.")))
    x, image = (torch.randn(*shape, generator=generator) for shape in ((5, 12), (2, 8, 6, 6)))
    with torch.no_grad():
        adapted, plain = model(x, image), Network()(x, image)
    linear = adapter.layers[f"unet.{LINEAR}"]
    convolution = adapter.layers[f"unet.{CONVOLUTION}"].reshaped(weights[f"{CONVOLUTION}.weight"].shape)
    for found, theirs, before in zip(
        (linear.delta(x), convolution.delta(image, padding=1)), adapted, plain, strict=True
    ):
        change = theirs - before
        assert change.norm() > 1e-2 * before.norm()
        assert (found - change).norm() < LIMIT * change.norm()


def test_peft_kinds_that_are_not_read_are_refused(tmp_path):
    model = peft.get_peft_model(Network(), peft.OFTConfig(oft_block_size=4, target_modules=["to_k"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"peft_type 'OFT'; expected one of LORA, LOHA, LOKR"):
        load_adapter(tmp_path / "adapter")


# What ComfyUI takes besides


def test_one_factor_of_a_convolution_stored_as_a_matrix(tmp_path):
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(2, 8, 3, 3, generator=generator), torch.randn(16, 2, generator=generator)
    tensors = {
        f"{STEM_OF_CONVOLUTION}.lora_down.weight": down,
        f"{STEM_OF_CONVOLUTION}.lora_up.weight": up,
        f"{STEM}.lora_down.weight": down[:, :, 0, 0].contiguous(),
        f"{STEM}.lora_up.weight": up[..., None, None].clone(),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    layers = load_adapter(tmp_path / "lora.safetensors").layers
    expected = (up @ down.flatten(1)).reshape(16, 8, 3, 3)
    assert torch.allclose(layers[STEM_OF_CONVOLUTION].weight_delta(), expected, atol=1e-6)
    assert torch.equal(layers[STEM].down, down[:, :, 0, 0])
    assert torch.equal(layers[STEM].up, up)


def test_what_belongs_to_a_text_encoder_or_an_embedding_is_left_out_whatever_it_is(tmp_path):
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {
        f"{STEM}.lora_down.weight": torch.ones(1, 12),
        f"{STEM}.lora_up.weight": torch.ones(16, 1),
        f"{text}.lora_down.weight": torch.ones(1, 12),
        f"{text}.lora_up.weight": torch.ones(16, 1),
        f"{text}.dora_scale": torch.ones(16, 1),
        "lora_te_text_model_embeddings.oft_R.weight": torch.ones(2, 2),
        "bundle_emb.cat.string_to_param.*": torch.ones(2, 768),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    adapter = load_adapter(tmp_path / "lora.safetensors")
    assert list(adapter.layers) == [STEM]
    assert any(
        "1 embeddings that come with it were left out (such as 'bundle_emb.cat" in note for note in adapter.notes
    )
    assert any("2 text-encoder layers were left out" in note for note in adapter.notes)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("q_layer.weight", "p_layer.weight", "lambda_layer"), "T-LoRA"),
        (("lora_up.weight", "lora_down.weight", "bm.weight"), "GLoRA with a third factor"),
        (("boft_R", "boft_s"), "OFT of PEFT"),
    ],
)
def test_kinds_that_are_refused_are_called_by_their_names(keys, name, tmp_path):
    save_file({f"{STEM}.{key}": torch.ones(2, 2) for key in keys}, tmp_path / "lora.safetensors")
    with pytest.raises(AdapterError, match=f"in the format {name}"):
        load_adapter(tmp_path / "lora.safetensors")


def test_loras_inside_flux_processors_are_called_by_their_name(tmp_path):
    keys = [
        f"double_blocks.0.processor.{name}.{side}.weight"
        for name in ("qkv_lora1", "proj_lora2")
        for side in ("down", "up")
    ]
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "lora.safetensors")
    with pytest.raises(AdapterError, match="LoRA inside Flux processors"):
        load_adapter(tmp_path / "lora.safetensors")
