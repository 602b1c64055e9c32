"""The technique for eval-unlearn: it finds it, makes it, and generates on a real ComfyUI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dev.models import CHECKPOINT
from dev.server import LOOPBACK, Server, free_port
from tests.bench.conftest import CAT, DOG, LORA, STEPS
from tests.conftest import ROOT
from unguide_bench.technique import UnGuideTechnique

SMALL = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "size": 64, "sampler": "euler"}
MODELS = {"checkpoint": CHECKPOINT, "lora": LORA}

RUNNER = """
import json, sys

from torch.utils.data import DataLoader
from eval_unlearn.registry import register_metric
from eval_unlearn.runners.single_benchmark_runner import SingleBenchmarkRunner
from eval_unlearn.types import Dataset, MetricResult

config = json.loads(sys.argv[1])


@register_metric("brightness")
class Brightness:
    def __init__(self):
        self.seen = []

    def load_dataset(self):
        return DataLoader(config["prompts"], batch_size=2, collate_fn=lambda prompts: Dataset(prompts))

    def update(self, images, prompts, metadata):
        self.seen += [sum(image.convert("L").tobytes()) / (image.width * image.height) for image in images]

    def compute(self):
        return MetricResult("brightness", sum(self.seen) / len(self.seen), {"pictures": self.seen})


runner = SingleBenchmarkRunner(
    "unguide", "brightness", technique_config=config["technique"], output_dir=config["out"], seed=7
)
print(json.dumps(runner.run()["metric_result"]))
"""


@pytest.mark.host
def test_unguide_erases_the_concept_and_spares_the_rest_by_the_techniques_interface(server: Server) -> None:
    guided = UnGuideTechnique(server=server.api.url, **MODELS, **SMALL, erase_from="passed over")
    base = UnGuideTechnique(server=server.api.url, **MODELS, **SMALL, method="base")
    (cat, dog), (base_cat, base_dog) = (one.generate([CAT, DOG], seed=7) for one in (guided, base))
    assert (dog.size, dog.mode) == ((64, 64), "RGB")
    assert dog.tobytes() == base_dog.tobytes()
    assert cat.tobytes() != base_cat.tobytes()
    (again,) = guided.generate([DOG], seed=8)
    assert again.tobytes() == dog.tobytes()
    (other,) = guided.generate([DOG], seed=8, num_inference_steps=STEPS - 1)
    assert other.tobytes() != dog.tobytes()


@pytest.mark.host
@pytest.mark.skipif(sys.version_info < (3, 11), reason="eval-unlearn needs Python 3.11")
def test_eval_unlearn_finds_it_by_its_entry_point_and_runs_a_benchmark_with_it(server: Server, tmp_path: Path) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (group,) = project["entry-points"]
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in project["entry-points"][group].items())]
    about = tmp_path / "installed" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    config = {
        "technique": {"server": server.api.url, **MODELS, **SMALL},
        "prompts": [CAT, DOG],
        "out": str(tmp_path / "results"),
    }
    command = [sys.executable, "-P", "-c", RUNNER, json.dumps(config)]
    path = f"{about.parent}:{ROOT}"
    run = subprocess.run(command, env={"PYTHONPATH": path, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert len(result["details"]["pictures"]) == 2
    assert len(list((tmp_path / "results").rglob("*.png"))) == 2


def test_a_technique_without_files_says_which() -> None:
    with pytest.raises(RuntimeError, match="needs checkpoint and lora: files as ComfyUI names them"):
        UnGuideTechnique(server="http://127.0.0.1:8188")


def test_a_wrong_method_is_refused_when_the_technique_is_made() -> None:
    with pytest.raises(RuntimeError, match="unknown method 'magic'"):
        UnGuideTechnique(**MODELS, method="magic")


@pytest.mark.host
def test_the_negative_prompt_is_the_concept(server: Server) -> None:
    negative = UnGuideTechnique(server=server.api.url, **MODELS, **SMALL, method="negative", erase_concept="cat")
    base = UnGuideTechnique(server=server.api.url, **MODELS, **SMALL, method="base")
    (image,), (plain,) = (one.generate([CAT], seed=7) for one in (negative, base))
    assert image.tobytes() != plain.tobytes()


def test_a_negative_prompt_without_a_concept_is_refused_when_the_technique_is_made() -> None:
    with pytest.raises(RuntimeError, match="'negative' has no negative prompt; give the concept"):
        UnGuideTechnique(**MODELS, method="negative")


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    technique = UnGuideTechnique(server=f"http://{LOOPBACK}:{free_port()}", **MODELS)
    with pytest.raises(RuntimeError, match="does not answer"):
        technique.generate([CAT])
