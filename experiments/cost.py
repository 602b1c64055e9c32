"""What UnGuide costs against plain sampling in the same run, and what the two ways without it cost.

Run by `python3 dev bench`. Every case is sampled in turn with the plain one; ratios are of medians. Model evaluations
are counted in the network itself; memory is the peak of the process (on a GPU: of PyTorch) while sampling. The
alternatives, two clones of the model that take turns and LoRA hooks on conditionings, blend with the same weight as
`detected_continue_both`.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.captions import CLASSES, photo
from experiments.runner import keep, publish
from experiments.studio import CFG, SAMPLER, SCHEDULER, counted, lora_patches, studio
from unguide_bench.tables import markdown

SEED = 7
STEPS, PROBE_STEPS = 30, 3
LARGER_STEPS, LARGER_PROBE_STEPS = 10, 1
CONCEPT, UNRELATED = photo("cat"), photo("forest")
BOTH = -1.0
"""A weight of the base model for which both predictions are needed, as in the paper."""
LARGER = ("not_detected", "detected_continue_both", "detected_continue_batched")
"""Cases that are measured at larger sizes as well."""


@dataclass
class Meter:
    """What a sampling run takes: model evaluations, seconds, peak memory in bytes."""

    evaluations: int = 0
    seconds: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Result:
    """One case against the plain run: ratios of medians, and the medians themselves."""

    evaluations_ratio: float
    wall_ratio: float
    memory_ratio: float
    differing_bits: int
    seconds: float
    plain_seconds: float
    sizes: dict[str, int] = field(default_factory=dict)


def on_gpu() -> bool:
    """Return whether the host computes on a GPU."""
    return torch.cuda.is_available() and os.environ.get("UNGUIDE_HOST_DEVICE", "cpu") != "cpu"


@contextmanager
def watched_memory(meter: Meter) -> Iterator[None]:
    """Measure the peak memory within the block."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        yield
        meter.memory = torch.cuda.max_memory_allocated()
        return
    page, done = os.sysconf("SC_PAGE_SIZE"), threading.Event()

    def poll() -> None:
        while not done.wait(0.005):
            meter.memory = max(meter.memory, int(Path("/proc/self/statm").read_text().split()[1]) * page)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


Sample = Callable[[int, int], Any]
"""Samples at a latent's side and batch size; returns the latent."""

Case = tuple[str, Sample]
"""The prompt, which the plain run generates as well, and what is measured."""


class Bench:
    """The shipped demo model in the host, and the ways to sample it.

    Args:
        steps, probe_steps: of the schedule, and those after which gates probe.
    """

    steps, probe_steps = STEPS, PROBE_STEPS

    def __init__(self) -> None:
        self.at = studio(wide=True)
        self.model, self.encode = self.at.model, self.at.encode
        self.loras = [self.at.lora("selective", concept) for concept in CLASSES]
        self.cat = self.loras[CLASSES.index("cat")]
        self.hundred = [copied(lora) for lora in self.loras for _ in range(10)]

    def noise(self, side: int, batch: int) -> Any:
        """Return the host's noise of one seed for a batch, [B, 4, side, side]."""
        import comfy.sample

        return comfy.sample.prepare_noise(torch.zeros(batch, 4, side, side), SEED)

    def sample(self, model: Any, prompt: str, side: int, batch: int) -> Any:
        noise = self.noise(side, batch)
        return self.at.generate(model, self.encode(prompt), [SEED] * batch, noise=noise, steps=self.steps).latents

    def guided(self, loras: Sequence[Any], weight: float = 0.0, **chosen: Any) -> Any:
        shared = {"on_detection": "continue", "low_memory": True, "weight_detected": weight}
        probe = {"probe_steps": self.probe_steps, "probe_schedule_steps": self.steps}
        return self.at.gate(loras, self.at.settings(**{**shared, **probe, **chosen}))[0]

    def with_guider(self, guider: Any, side: int, batch: int) -> Any:
        """Sample with a guider of ours as SamplerCustomAdvanced does."""
        import comfy.samplers

        noise = self.noise(side, batch)
        sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), SCHEDULER, self.steps)
        sampler = comfy.samplers.sampler_object(SAMPLER)
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=SEED)

    def clones(self, side: int, batch: int) -> Any:
        """Two clones of the model that take turns in every step, the adapter merged into one by the host."""
        import comfy.model_management
        import comfy.samplers

        other = self.at.merged(self.cat)

        class TakingTurns(comfy.samplers.CFGGuider):
            def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
                base = super().predict_noise(x, timestep, model_options or {}, seed)
                mine = self.model_patcher
                comfy.model_management.load_models_gpu([other])
                adapted = super().predict_noise(x, timestep, model_options or {}, seed)
                comfy.model_management.load_models_gpu([mine])
                return BOTH * base + (1.0 - BOTH) * adapted

        guider = TakingTurns(self.model)
        guider.set_conds(self.encode(CONCEPT), self.encode(""))
        guider.set_cfg(CFG)
        return self.with_guider(guider, side, batch)

    def hooks(self, side: int, batch: int) -> Any:
        """The adapter as a LoRA hook on a second pair of conditionings."""
        import comfy.hooks
        import comfy.samplers

        hook = comfy.hooks.create_hook_lora(lora_patches(self.cat.adapter), 1.0, 0.0)

        class Hooked(comfy.samplers.CFGGuider):
            def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
                names = ("positive", "negative", "adapted_positive", "adapted_negative")
                conds = [self.conds[name] for name in names]
                rows = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options or {})
                base, adapted = (low + self.cfg * (high - low) for high, low in (rows[:2], rows[2:]))
                return BOTH * base + (1.0 - BOTH) * adapted

        hooked = {
            f"adapted_{name}": comfy.hooks.set_hooks_for_conditioning(self.encode(prompt), hook)
            for name, prompt in (("positive", CONCEPT), ("negative", ""))
        }
        guider = Hooked(self.model)
        guider.inner_set_conds({"positive": self.encode(CONCEPT), "negative": self.encode(""), **hooked})
        guider.set_cfg(CFG)
        return self.with_guider(guider, side, batch)

    def cases(self) -> dict[str, Case]:
        """Return what is measured, by name."""

        cat, ten = [without_text(self.cat)], list(map(without_text, self.loras))

        def gated(prompt: str, loras: Sequence[Any] = cat, **options: Any) -> Case:
            def sample(side: int, batch: int) -> Any:
                return self.sample(self.guided(loras, **options), prompt, side, batch)

            return prompt, sample

        return {
            "text_not_detected": gated(UNRELATED, [self.cat]),
            "text_detected": gated(CONCEPT, [self.cat]),
            "text_ten_adapters_not_detected": gated(UNRELATED, self.loras),
            "text_hundred_adapters_not_detected": gated(UNRELATED, self.hundred),
            "not_detected": gated(UNRELATED),
            "detected_continue": gated(CONCEPT),
            "detected_restart": gated(CONCEPT, on_detection="restart"),
            "detected_continue_both": gated(CONCEPT, weight=BOTH),
            "detected_continue_batched": gated(CONCEPT, weight=BOTH, low_memory=False),
            "detected_restart_both": gated(CONCEPT, weight=BOTH, on_detection="restart"),
            "before_sampling": gated(UNRELATED, decide="before sampling"),
            "as_the_paper": gated(UNRELATED, decide="as the paper"),
            "ten_adapters_not_detected": gated(UNRELATED, ten),
            "ten_adapters_not_detected_batched": gated(UNRELATED, ten, low_memory=False),
            "clones": (CONCEPT, self.clones),
            "hooks": (CONCEPT, self.hooks),
        }


def without_text(lora: Any) -> Any:
    """An erasure LoRA whose text stage is not calibrated, so that its trajectory stage decides."""
    card = replace(lora.adapter.card, calibration={**lora.adapter.card.calibration, "text": None})
    return replace(lora, adapter=replace(lora.adapter, card=card))


def copied(lora: Any) -> Any:
    """An erasure LoRA of its own, with the same contents."""
    return replace(lora, adapter=replace(lora.adapter))


def measured(bench: Bench, prompt: str, sample: Sample, side: int, batch: int, times: int) -> Result:
    """Measure a case and plain sampling in turn; of several times, one more comes first and does not count."""
    plain_runs: list[Meter] = []
    case_runs: list[Meter] = []
    bits = 0
    for number in range(times + (times > 1)):
        for runs, case in ((plain_runs, None), (case_runs, sample)):
            meter = Meter()
            with watched_memory(meter), counted(bench.model) as evaluations:
                started = time.perf_counter()
                if case is None:
                    expected = bench.sample(bench.model, prompt, side, batch)
                else:
                    latent = case(side, batch)
                meter.seconds = time.perf_counter() - started
            meter.evaluations = evaluations.count
            if number or times == 1:
                runs.append(meter)
        bits = differing_bits(expected, latent)

    def ratio(name: str) -> float:
        mine, plain = ([getattr(meter, name) for meter in runs] for runs in (case_runs, plain_runs))
        return round(statistics.median(mine) / statistics.median(plain), 4)

    mine, plain = (round(statistics.median(m.seconds for m in runs), 3) for runs in (case_runs, plain_runs))
    sizes = {"latent": side, "batch": batch, "steps": bench.steps, "times": times}
    return Result(ratio("evaluations"), ratio("seconds"), ratio("memory"), bits, mine, plain, sizes)


def differing_bits(first: Any, second: Any) -> int:
    """Return how many bits of two float32 latents differ."""
    a, b = (tensor.float().cpu().contiguous().numpy().view(np.uint32) for tensor in (first, second))
    return int(np.unpackbits((a ^ b).view(np.uint8)).sum())


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Return the results in Markdown."""
    lines = []
    for name, case in cases.items():
        size = case["sizes"]
        ratios = (f"{case['evaluations_ratio']:.3f}x", f"{case['wall_ratio']:.2f}x", f"{case['memory_ratio']:.3f}x")
        seconds = f"{case['seconds']:.1f} ({case['plain_seconds']:.1f})"
        sizes = (f"{size['latent']}x{size['latent']}", str(size["batch"]), str(size["steps"]))
        lines.append((name, *sizes, *ratios, str(case["differing_bits"]), seconds))
    heads = ("case", "latent", "batch", "steps", "NFE", "wall time", "peak memory", "differing bits", "s (plain)")
    return markdown(heads, lines)


def machine() -> str:
    """Return the name of what the figures were measured on."""
    if on_gpu():
        return torch.cuda.get_device_name()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].split(":")[1].strip() if models else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads"


@torch.inference_mode()
def run(options: Namespace) -> None:
    """Measure every case at every size, and print the table."""
    bench, cases = Bench(), dict[str, dict[str, Any]]()
    sizes = [(8, 1)] if options.quick else [(8, 1), (8, 4), (16, 1), (16, 4), (32, 1), (32, 4)]
    if on_gpu() and not options.quick:
        sizes.append((64, 1))  # the demo model is of SD 1.5's size: images of 512 pixels
    for side, batch in sizes:
        smallest = (side, batch) == sizes[0]
        if not smallest:
            bench.steps, bench.probe_steps = LARGER_STEPS, LARGER_PROBE_STEPS
        for name, (prompt, sample) in bench.cases().items():
            chosen = not options.case or name in options.case
            if not chosen or (not smallest and name not in LARGER):
                continue
            times = options.times if smallest else 1
            key = name if smallest else f"{name}_{side}x{side}_batch{batch}"
            cases[key] = asdict(measured(bench, prompt, sample, side, batch, times))
            print(f"{key}: {cases[key]}", file=sys.stderr)
    keep(options.json, {"machine": machine(), "cases": cases})
    publish(f"Measured on {machine()}.\n\n{table(cases)}", options.markdown, "bench")
