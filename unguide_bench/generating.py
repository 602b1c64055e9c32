"""Generates what is missing of a run, on one server or many, into its folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .api import ApiError
from .errors import BenchError
from .folder import Folder
from .generator import GeneratedImage, ImageGenerator, Plan
from .graphs import Job
from .methods import Method, Settings
from .prompts import Prompts


@dataclass(frozen=True)
class Servers:
    """Where images are generated.

    Args:
        urls: one or more; more are used through Ray.
        ray: the Ray cluster: "local" for one on this machine, "auto" for the one that runs already, else its address.
        timeout: seconds that an image may take.
    """

    urls: tuple[str, ...]
    ray: str = "local"
    timeout: float = 600.0


def jobs_of(prompts: Prompts, methods: Sequence[Method], seeds: Sequence[int], cfg: float) -> list[Job]:
    """Return every image of a run, one method after the other, so that models are not swapped at every image.

    Args:
        seeds, cfg: of prompts that have none of their own.
    """
    return [
        Job(method, item.text, seed, cfg if item.cfg is None else float(item.cfg))
        for method in methods
        for item in prompts.items
        for seed in (seeds if item.seed is None else (item.seed,))
    ]


def generate_missing(folder: Folder, settings: Settings, jobs: Iterable[Job], target: str, servers: Servers) -> None:
    """Generate the jobs whose images the folder lacks, with a progress bar.

    Args:
        target: the concept's prompt, see `ImageGenerator.prepare`.
    Raises: BenchError naming what stopped it; what is generated is kept.
    """
    from tqdm import tqdm

    jobs = list(jobs)
    missing = folder.missing(jobs)
    if not missing:
        return
    if not servers.urls:
        raise BenchError(f"{len(missing)} images are missing in {folder.path}; give a ComfyUI with --server")
    try:
        generators = [ImageGenerator(url, settings, servers.timeout) for url in servers.urls]
        for generator in generators:
            generator.check()
        plan = generators[0].prepare(missing, target)
        folder.begin(settings, plan)
        count = len({(job.method, job.prompt, job.seed, job.cfg) for job in jobs})
        with tqdm(total=count, initial=count - len(missing), unit="image", smoothing=0.1) as bar:
            for job, image in _images(missing, plan, servers):
                folder.add(job, image)
                bar.update()
    except OSError as error:
        raise BenchError(f"{folder.path} cannot be written ({error.strerror}); make room and start again") from error
    except ApiError as error:
        raise BenchError(f"{error}; {len(folder.missing(jobs))} images are missing; start again to resume") from error


def _images(missing: Sequence[Job], plan: Plan, servers: Servers) -> Iterator[tuple[Job, GeneratedImage]]:
    if len(servers.urls) > 1:
        from .cluster import generate_on_ray

        yield from generate_on_ray(missing, plan, servers.urls, servers.ray, servers.timeout)
        return
    generator = ImageGenerator(servers.urls[0], plan.settings, servers.timeout)
    for job in missing:
        yield job, generator.generate(job, plan)
