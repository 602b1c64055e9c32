"""Generates and judges images of the demo model with ComfyUI's own samplers, many seeds of a prompt at a time.

It does not know methods of erasure and scores.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from demo.captions import SYNONYMS
from demo.shapes import TEXT_LAYERS
from dev.narrow_host import load_narrow_model, narrow_lora
from dev.pack import counted, lora_patches, pack_module, start_host

CHECKPOINT = "unguide-demo.safetensors"
CFG, STEPS, SAMPLER, SCHEDULER = 4.0, 10, "euler", "normal"
PROBE_STEPS = 1
"""Of `STEPS`, after which gates probe: a tenth of the schedule, as by default."""
LATENT = (4, 8, 8)
CLOSED_FORM = "closed form"
"""The set of erasure LoRAs that are made in closed form, in no file."""


@dataclass(frozen=True)
class Generated:
    """One prompt's images, one per seed.

    Args:
        latents: [B, 4, 8, 8].
        evaluations: model evaluations (NFE) for one image by itself.
        detected, scores, thresholds: the gate's, by image; empty without a gate.
        restarted: whether the gate started the images again.
    """

    latents: Any
    evaluations: float
    detected: tuple[bool, ...] = ()
    scores: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    restarted: bool = False


class Studio:
    """The demo model and its erasure LoRAs in the host of this process.

    Args:
        wide: use the shipped checkpoint instead of its narrow twin, which is eight times faster.
    """

    def __init__(self, wide: bool = False) -> None:
        start_host()
        import torch

        import nodes

        logging.getLogger().setLevel(logging.WARNING)
        torch.set_flush_denormal(True)
        self.wide = wide
        self.checkpoint, self.clip, _ = nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT)  # type: ignore[attr-defined]  # ComfyUI's nodes, not ours
        self.model = self.checkpoint if wide else load_narrow_model()
        if not wide:  # these layers add zeros, and take most of the encoder's time
            del self.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[TEXT_LAYERS:]
        self.loras: dict[tuple[str, str, float], Any] = {}
        self.encoded: dict[str, Any] = {}

    @cached_property
    def decoder(self) -> Any:
        from demo.networks import load_vae

        return load_vae()[1]

    def encode(self, prompt: str) -> Any:
        """Return a prompt's CONDITIONING."""
        if prompt not in self.encoded:
            self.encoded[prompt] = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
        return self.encoded[prompt]

    def lora(self, kind: str, concept: str, strength: float = 1.0) -> Any:
        """Return an erasure LoRA of a set, for the studio's model; `CLOSED_FORM` ones are made here."""
        key = kind, concept, strength
        if kind == CLOSED_FORM and key not in self.loras:
            self.loras[key] = replace(self.closed_form(concept, SYNONYMS[concept]), strength=strength)
        elif key not in self.loras:
            load = pack_module("unguide_comfy.lora.load").load_erasure_lora
            lora = load(f"unguide-demo/{kind}/{concept}.safetensors", strength, self.clip)
            self.loras[key] = lora if self.wide else narrow_lora(lora, self.model)
        return self.loras[key]

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

    def noise(self, seeds: Sequence[int]) -> Any:
        """Return the host's noise for each seed, as a batch of one would start from, [B, 4, 8, 8]."""
        import comfy.sample
        import torch

        return torch.cat([comfy.sample.prepare_noise(torch.zeros(1, *LATENT), seed) for seed in seeds])

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
        import torch

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
        runs: list[tuple[Sequence[Any], Any]] = []
        attach = pack_module("unguide_comfy.gate.attach")
        model = attach.guided(self.model, [lora], settings, observer=lambda *run: runs.append(run))
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
            restarted=cost.evaluations["wasted"] > 0,
        )

    def images(self, latents: Any) -> Any:
        """Return decoded latents, uint8 [B, 64, 64, 3]."""
        import torch

        from demo.seed import VAE_SCALE

        decoded = torch.cat([self.decoder(part * VAE_SCALE) for part in latents.float().split(20)]).clamp(0, 1)
        return (decoded.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


def judged(images: Any) -> list[tuple[str, str]]:
    """Return what each image shows, and which of the ten classes it is nearest to.

    The judge may see "other". A scene must be nearest to something: of the ten, a desert is nearest to a bird.
    """
    from demo.captions import CLASSES
    from demo.classifier import LABELS, classify

    shares = classify(images)
    nearest = shares[:, : len(CLASSES)].argmax(dim=-1).tolist()
    return [(LABELS[i], CLASSES[j]) for i, j in zip(shares.argmax(dim=-1).tolist(), nearest, strict=True)]


@lru_cache(maxsize=2)
def studio(wide: bool = False) -> Studio:
    """This process's studio."""
    return Studio(wide)
