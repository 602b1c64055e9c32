"""Why the loss jumps where the selective loop renews its latents: how far the goals lie away there.

    python -m demo.renewal --tokenizer ComfyUI/comfy/sd1_tokenizer [--concept cat]

Trains with the preset until its latents are renewed, and prints for the latents before and after that the erasure loss
of the untrained adapter and of the one in training.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from unguide_core.training.prompts import prompts_for
from unguide_core.training.recipe import PRESETS
from unguide_core.training.rollout import Latents
from unguide_core.training.trainer import Training, fresh_layers

from .captions import CLASSES, REFERENCES, SYNONYMS
from .erasure import Learner
from .narrow import LATENT, Narrow, load_narrow
from .unet import CONTEXT_DIM

LATE = 500
"""Timesteps below it are called late: little noise is left."""


def at_renewal(narrow: Narrow, concept: str) -> str:
    """Returns the losses over the latents before and after they are renewed, as rows of a table."""
    recipe = replace(PRESETS["selective"], check=0)
    recipe = replace(recipe, iterations=recipe.refresh + 1)
    prompts = prompts_for(concept, REFERENCES[concept], SYNONYMS[concept])
    layers = fresh_layers({name: (CONTEXT_DIM, layer.out_features) for name, layer in narrow.layers.items()}, recipe)
    training = Training(learner := Learner(narrow, layers, prompts), layers, prompts, recipe, LATENT)
    pools: list[Latents] = []
    rows: list[str] = []
    renewed = training._refreshed

    @torch.no_grad()
    def losses(pool: Latents) -> torch.Tensor:
        eps = training.denoiser.eps(pool.z, pool.timesteps, pool.prompts)
        return (eps - pool.eps).square().flatten(1).mean(1)

    def noted() -> Latents:
        pools.append(renewed())
        if len(pools) == 2:
            for name, pool in zip(("before", "after"), pools, strict=True):
                untrained, late = losses(pool), pool.timesteps < LATE
                with learner.adapted():
                    trained = losses(pool)
                cells = [f"{values[part].mean():.2f}" for part in (late, ~late) for values in (untrained, trained)]
                share = float(trained.mean() / untrained.mean())
                rows.append(f"| {concept} | {name} | {' | '.join(cells)} | {share:.2f} |")
        return pools[-1]

    training._refreshed = noted  # type: ignore[method-assign]
    for _ in training.run():
        pass
    return "\n".join(rows)


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(prog="python -m demo.renewal", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="ComfyUI's folder comfy/sd1_tokenizer")
    parser.add_argument("--concept", nargs="+", choices=CLASSES, default=["cat"], help="default: cat")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    narrow = load_narrow(options.tokenizer)
    heads = ("late, untrained", "late, trained", "early, untrained", "early, trained", "trained / untrained")
    print(f"| concept | latents | {' | '.join(heads)} |\n{'|---' * (len(heads) + 2)}|")
    for concept in options.concept:
        print(at_renewal(narrow, concept), flush=True)


if __name__ == "__main__":
    main()
