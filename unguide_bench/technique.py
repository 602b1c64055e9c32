"""UnGuide as a technique of eval-unlearn (entry point group `eval_unlearn.techniques`), on a running ComfyUI.

eval-unlearn finds it by itself where this package is installed: `technique_name="unguide"`. It is not imported here:
a technique is a class that takes its configuration and has `generate`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .api import ApiError
from .errors import BenchError
from .generator import ImageGenerator, Plan
from .graphs import Job
from .methods import Method, Settings

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Configuration:
    """What eval-unlearn passes on as `technique_config`; named as other techniques name them.

    Args:
        server: a running ComfyUI with this pack.
        checkpoint, lora: files as the server names them.
        erase_concept: the concept: its own prompt for the gate, where the LoRA's metadata has none, and the negative
            prompt of the method "negative".
        method: during, before, as-the-paper, always:WEIGHT, or one without UnGuide: base, negative, lora:STRENGTH.
        num_inference_steps, guidance_scale, sampler, scheduler, size: of the images.
    """

    checkpoint: str
    lora: str
    server: str = "http://127.0.0.1:8188"
    erase_concept: str = ""
    method: str = "during"
    strength: float = 1.0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    sampler: str = "ddim"
    scheduler: str = "normal"
    size: int = 512
    timeout: float = 600.0


class UnGuideTechnique:
    """Generates prompts with UnGuide.

    Args:
        options: the fields of `Configuration`; others are ignored, as eval-unlearn's own techniques do.
    Raises: RuntimeError where a field is missing or wrong, or the server cannot generate.
    """

    def __init__(self, **options: Any) -> None:
        known = {field.name for field in fields(Configuration)}
        if missing := [name for name in ("checkpoint", "lora") if not options.get(name)]:
            raise RuntimeError(f"the technique unguide needs {' and '.join(missing)}: files as ComfyUI names them")
        self.config = Configuration(**{name: value for name, value in options.items() if name in known})
        try:
            self.method = Method.parse(self.config.method)
            self.settings(self.config.num_inference_steps).require_prompt_of(self.method)
        except BenchError as error:
            raise RuntimeError(str(error)) from error
        self.ready: dict[tuple[int, bool], tuple[ImageGenerator, Plan]] = {}

    def settings(self, steps: int) -> Settings:
        """The settings of images with so many steps."""
        config = self.config
        return Settings(
            checkpoint=config.checkpoint,
            lora=config.lora,
            strength=config.strength,
            negative=config.erase_concept,
            steps=steps,
            cfg=config.guidance_scale,
            sampler=config.sampler,
            scheduler=config.scheduler,
            size=config.size,
        )

    def generate(self, prompts: Sequence[str], seed: int | None = None, **options: Any) -> list[Image]:
        """An image of each prompt; their seeds count up from `seed`, as in eval-unlearn's own techniques.

        Args:
            options: num_inference_steps and guidance_scale, other than the configuration's.
        Raises: RuntimeError with what the server said.
        """
        from PIL import Image

        steps = int(options.get("num_inference_steps", self.config.num_inference_steps))
        cfg = float(options.get("guidance_scale", self.config.guidance_scale))
        jobs = [Job(self.method, prompt, (seed or 0) + number, cfg) for number, prompt in enumerate(prompts)]
        try:
            generator, plan = self._generator(steps, jobs)
            return [Image.open(io.BytesIO(generator.generate(job, plan).png)).convert("RGB") for job in jobs]
        except (ApiError, BenchError) as error:
            raise RuntimeError(str(error)) from error

    def _generator(self, steps: int, jobs: Sequence[Job]) -> tuple[ImageGenerator, Plan]:
        """The server, asked once whether it can generate such images."""
        key = (steps, any(job.cfg != 1 for job in jobs))
        if key not in self.ready:
            generator = ImageGenerator(self.config.server.rstrip("/"), self.settings(steps), self.config.timeout)
            self.ready[key] = generator, generator.prepare(jobs, self.config.erase_concept)
        return self.ready[key]
