"""How far the narrow model's images are from the shipped checkpoint's; the benchmark relies on their agreement."""

from __future__ import annotations

from demo.captions import CLASSES, photo
from dev.benchmark.methods import gate
from dev.benchmark.studio import Studio, studio

SEEDS = (1, 2)


def agreement() -> dict[str, float]:
    """Generate the concept's and an unrelated prompt behind the gate, at both widths, and compare.

    Returns: `latents`, the largest relative difference; `pictures`, the largest difference of two images' values, 0 to
    255; `scores`, the largest difference of the gate's scores; `decisions`, how many differ.
    """
    import torch

    apart = {"latents": 0.0, "pictures": 0.0, "scores": 0.0, "decisions": 0.0}
    narrow, wide = studio(), Studio(wide=True)
    concept, other = CLASSES[3], CLASSES[5]
    with torch.inference_mode():
        for prompt in (photo(concept), photo(other)):
            one, two = (
                s.guided(s.lora("selective", concept), s.encode(prompt), SEEDS, gate(s)) for s in (narrow, wide)
            )
            first, second = (narrow.images(generated.latents).astype(int) for generated in (one, two))
            differences = {
                "latents": float((one.latents - two.latents).abs().max() / two.latents.abs().max()),
                "pictures": float(abs(first - second).max()),
                "scores": max(abs(a - b) for a, b in zip(one.scores, two.scores, strict=True)),
                "decisions": float(sum(a != b for a, b in zip(one.detected, two.detected, strict=True))),
            }
            apart = {name: max(value, differences[name]) for name, value in apart.items()}
    return apart
