"""The demo model in the host of this process: the one loader, sampler and judge of all experiments.

Many seeds, and many prompts, are sampled at a time, with ComfyUI's own samplers. It does not know methods of erasure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from demo.captions import CLASSES, SCENES, SYNONYMS, photo, words_for
from demo.classifier import judged
from demo.networks import load_vae
from demo.seed import VAE_SCALE
from dev.models import CHECKPOINT
from dev.pack import pack_module, start_host
from experiments.narrow import load_narrow_model, narrow_lora
from experiments.scenes import SceneJudge, difference_along_border, scene_prompts
from unguide_bench.scores import ERASED, OTHER, SCENE, SYNONYM, JudgedImage

CFG, STEPS, SAMPLER, SCHEDULER = 4.0, 10, "euler", "normal"
PROBE_STEPS = 1
"""Of `STEPS`, after which gates probe: a tenth of the schedule, as by default."""
LATENT = (4, 8, 8)
CLOSED_FORM = "closed form"
"""The set of erasure LoRAs that are made in closed form, in no file."""
PRESET = "preset"
"""The set that an experiment trains, as a user would: by the node with its defaults; see `Studio.add`."""
SCENE_SEEDS = range(950_000, 950_016)
"""Of the images of each plain scene that the judge of scenes learns from."""


@dataclass
class Evaluations:
    """Model evaluations (NFE), counted in the network itself: one is one latent under one conditioning."""

    count: int = 0


@contextmanager
def counted(model: Any) -> Iterator[Evaluations]:
    """Within the block count the evaluations of a `ModelPatcher`'s network, by whichever clone.

    By a hook on the network: a wrapper on the model would be a patch, for which calibrations do not hold.
    """
    evaluations = Evaluations()

    def count(network: Any, arguments: tuple[Any, ...]) -> None:
        evaluations.count += arguments[0].shape[0]

    hook = model.model.diffusion_model.register_forward_pre_hook(count)
    try:
        yield evaluations
    finally:
        hook.remove()


def lora_patches(adapter: Any) -> dict[str, Any]:
    """An adapter's weights under the names that the host's own LoRA loader reads."""
    return {
        f"{name}.{part}": tensor
        for name, layer in adapter.layers.items()
        for part, tensor in {
            "lora_down.weight": layer.down,
            "lora_up.weight": layer.up,
            "alpha": torch.tensor(layer.scale * layer.rank),
        }.items()
    }


@dataclass(frozen=True)
class Generated:
    """The images of a batch.

    Args:
        latents: [B, 4, 8, 8].
        evaluations: model evaluations (NFE) for one image by itself.
        detected, scores, thresholds, statistics: the gate's, by image; empty without a gate.
        restarted: whether the gate started the images again.
    """

    latents: Any
    evaluations: float
    detected: tuple[bool, ...] = ()
    scores: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    statistics: tuple[str, ...] = ()
    restarted: bool = False


@dataclass(frozen=True)
class Asked:
    """A prompt, its kind as seen from the erased concept (`unguide_bench.scores`), its class, and its scene if any."""

    prompt: str
    kind: str
    label: str
    scene: str = ""


def asked(concept: str, others: Sequence[str] = CLASSES) -> list[Asked]:
    """Return a concept's prompts: its name, its synonyms, the other classes' names."""
    own = [Asked(photo(word), SYNONYM if i else ERASED, concept) for i, word in enumerate(words_for(concept))]
    return own + [Asked(photo(other), OTHER, other) for other in others if other != concept]


def asked_in_scenes(concept: str) -> list[Asked]:
    """Return the prompts that place a concept in each scene."""
    return [Asked(prompt, SCENE, concept, scene) for prompt, scene in scene_prompts(concept).items()]


class Studio:
    """The demo model and its erasure LoRAs in the host of this process.

    Args:
        wide: use the shipped checkpoint instead of its narrow twin, which is eight times faster.
    """

    def __init__(self, wide: bool = False) -> None:
        start_host()
        import nodes

        logging.getLogger().setLevel(logging.WARNING)
        torch.set_flush_denormal(True)
        self.wide = wide
        self.checkpoint, self.clip, _ = nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT)  # type: ignore[attr-defined]  # ComfyUI's nodes, not ours
        self.model = self.checkpoint if wide else load_narrow_model()
        pack_module("nodes.demo").skip_idle_layers(self.clip)
        self.loras: dict[tuple[str, str, float], Any] = {}
        self.encoded: dict[str, Any] = {}

    @cached_property
    def decoder(self) -> Any:
        return load_vae()[1]

    @cached_property
    def scene_judge(self) -> SceneJudge:
        """The judge of scenes, which learns from the base model's images of plain ones."""
        made = {scene: self.generate(self.model, self.encode(photo(scene)), SCENE_SEEDS) for scene in SCENES}
        return SceneJudge({scene: self.images(one.latents) for scene, one in made.items()})

    def encode(self, prompt: str) -> Any:
        """Return a prompt's CONDITIONING."""
        if prompt not in self.encoded:
            self.encoded[prompt] = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
        return self.encoded[prompt]

    def lora(self, kind: str, concept: str, strength: float = 1.0) -> Any:
        """Return an erasure LoRA of a set, for the studio's model; `CLOSED_FORM` ones are made here, others added."""
        key = kind, concept, strength
        if kind == CLOSED_FORM and key not in self.loras:
            self.loras[key] = replace(self.closed_form(concept, SYNONYMS[concept]), strength=strength)
        elif key not in self.loras:
            load = pack_module("unguide_comfy.lora.load").load_erasure_lora
            lora = load(f"unguide-demo/{kind}/{concept}.safetensors", strength, self.clip)
            self.loras[key] = lora if self.wide else narrow_lora(lora, self.model)
        return self.loras[key]

    def add(self, kind: str, concept: str, lora: Any) -> None:
        """Make an erasure LoRA for the studio's model known to `lora`."""
        self.loras[kind, concept, 1.0] = lora

    def closed_form(self, concept: str, synonyms: Sequence[str], **words: Any) -> Any:
        """Return an erasure LoRA as the node Erase Concept makes it, with its defaults.

        Args:
            words: further fields of the node's `Words`.
        """
        erase = pack_module("unguide_comfy.erase.concept")
        chosen = erase.Words((concept,), synonyms=(tuple(synonyms),), **words)
        settings = pack_module("unguide_core.closed_form").ClosedForm()
        (lora,), _ = erase.erase_concepts(self.model, self.clip, chosen, settings)
        return lora

    def merged(self, lora: Any) -> Any:
        """Return a clone of the model with a LoRA merged by the host, as its own LoRA loader does it."""
        import comfy.sd

        patches = lora_patches(lora.adapter)
        return comfy.sd.load_lora_for_models(self.model, None, patches, lora.strength, 0.0)[0]

    def settings(self, **chosen: Any) -> Any:
        """Return a gate's settings (`unguide_comfy.probe.settings`) with the benchmark's probe, and others."""
        probe = {"probe_steps": PROBE_STEPS, "probe_schedule_steps": STEPS}
        return pack_module("unguide_comfy.probe.settings").Settings(**{**probe, **chosen})

    def gate(self, loras: Iterable[Any], settings: Any) -> tuple[Any, list[tuple[Any, Any]]]:
        """Return the model behind the gate of erasure LoRAs, and where each of its runs leaves verdicts and cost."""
        runs: list[tuple[Any, Any]] = []
        attach = pack_module("unguide_comfy.gate.attach")
        return attach.guided(self.model, list(loras), settings, observer=lambda *run: runs.append(run)), runs

    def noise(self, seeds: Sequence[int]) -> Any:
        """Return the host's noise for each seed, as a batch of one would start from, [B, 4, 8, 8]."""
        import comfy.sample

        return torch.cat([comfy.sample.prepare_noise(torch.zeros(1, *LATENT), seed) for seed in seeds])

    def batch(self, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of `generate` and `guided` for each prompt in turn with each seed."""
        states = torch.cat([self.encode(prompt)[0][0].expand(len(seeds), -1, -1) for prompt in prompts])
        noise = self.noise(seeds).repeat(len(prompts), 1, 1, 1)
        return {"positive": [[states, {}]], "seeds": list(seeds) * len(prompts), "noise": noise}

    def generate(
        self,
        model: Any,
        positive: Any,
        seeds: Sequence[int],
        *,
        negative: Any = None,
        noise: Any = None,
        latent: Any = None,
        denoise: float = 1.0,
        steps: int = STEPS,
        scheduler: str = SCHEDULER,
        last_step: int | None = None,
    ) -> Generated:
        """Sample one image per seed with ComfyUI's sampler.

        Args:
            positive, negative: CONDITIONING; the empty prompt where there is no negative one.
            noise, latent: to start from, [B, 4, 8, 8]; None for the seeds' own noise and an empty latent.
            denoise: share of the schedule, as KSampler's.
            steps, scheduler: the schedule.
            last_step: sample only so many of the steps; None for all.
        """
        import comfy.sample

        noise = self.noise(seeds) if noise is None else noise
        with counted(model) as evaluations:
            latents = comfy.sample.sample(
                model,
                noise,
                steps,
                CFG,
                SAMPLER,
                scheduler,
                positive,
                self.encode("") if negative is None else negative,
                torch.zeros_like(noise) if latent is None else latent,
                denoise=denoise,
                last_step=last_step,
                disable_pbar=True,
                seed=seeds[0],
            )
        return Generated(latents, evaluations.count / len(noise))

    def guided(self, lora: Any, positive: Any, seeds: Sequence[int], settings: Any, **options: Any) -> Generated:
        """Do the same behind a gate.

        A decision for a whole batch, and what it cost, counts for every image of the batch.
        """
        model, runs = self.gate([lora], settings)
        generated = self.generate(model, positive, seeds, **options)
        (((verdict,), cost),) = runs
        decisions = verdict.decisions
        shared = len(decisions) < len(seeds)
        again = cost.evaluations["probe"] * (len(seeds) - 1) if shared else 0.0
        decisions = tuple(decisions) * (len(seeds) if shared else 1)
        return replace(
            generated,
            evaluations=generated.evaluations + again,
            detected=tuple(decision.detected for decision in decisions),
            scores=tuple(decision.score for decision in decisions),
            thresholds=tuple(decision.threshold for decision in decisions),
            statistics=tuple(decision.statistic for decision in decisions),
            restarted=cost.evaluations["wasted"] > 0,
        )

    def images(self, latents: Any) -> Any:
        """Return decoded latents, uint8 [B, 64, 64, 3]."""
        decoded = torch.cat([self.decoder(part * VAE_SCALE) for part in latents.float().split(20)]).clamp(0, 1)
        return (decoded.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()

    def judge(
        self,
        method: str,
        concept: str,
        asked: Sequence[Asked],
        seeds: Sequence[int],
        generated: Generated,
        base: tuple[Any, Any] | None = None,
        reference: str = "",
    ) -> tuple[list[JudgedImage], Any]:
        """Return a batch's images as judged, and the images, uint8 [B, 64, 64, 3].

        Args:
            asked: the batch's prompts, each of which has an image for every seed.
            base: the base model's latents and images of the same batch, to compare with.
            reference: the prompt of the scene that takes the concept's place, to look for; none where it is empty.
        """
        images, records = self.images(generated.latents), []
        places = [(one, seed) for one in asked for seed in seeds]
        for i, ((one, seed), (seen, closest)) in enumerate(zip(places, judged(images), strict=True)):
            apart = None if base is None else np.abs(images[i].astype(int) - base[1][i].astype(int))
            kept = None
            if base is not None and one.scene:
                now, before = self.scene_judge(np.stack([images[i], base[1][i]]))
                kept = now == one.scene if before == one.scene else None
            replaced = None
            if reference and one.kind in (ERASED, SYNONYM):
                replaced = seen not in CLASSES and photo(self.scene_judge(images[i : i + 1])[0]) == reference
            records.append(
                JudgedImage(
                    method,
                    concept,
                    one.prompt,
                    one.kind,
                    one.label,
                    seed,
                    seen,
                    generated.detected[i] if generated.detected else None,
                    generated.evaluations,
                    0.0,
                    None if apart is None else float(apart.mean()),
                    None if apart is None else float(apart.max()),
                    None if base is None else identical(generated.latents[i], base[0][i]),
                    closest,
                    generated.scores[i] if generated.scores else None,
                    generated.thresholds[i] if generated.thresholds else None,
                    kept,
                    None if base is None else difference_along_border(images[i], base[1][i]),
                    replaced,
                )
            )
        return records, images


def identical(one: Any, other: Any) -> bool:
    """Return whether two latents are the same, bit for bit."""
    return bool(np.asarray(one).tobytes() == np.asarray(other).tobytes())


@lru_cache(maxsize=2)
def studio(wide: bool = False) -> Studio:
    """This process's studio."""
    return Studio(wide)
