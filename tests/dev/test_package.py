"""The package for the registry: what is in the zip, what its checks refuse, and that the zip alone erases a concept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dev import package, workflow
from dev.cli import commands
from dev.host import Host
from dev.report import Progress
from dev.server import Server, running_server
from dev.workspace import PACK

SHIPPED = {
    "nodes",
    "unguide_core",
    "unguide_comfy",
    "unguide_policy",
    "web",
    "locales",
    "workflows",
    "subgraphs",
    "demo",
}
FILES = {"__init__.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE"}
DEMO_CODE = {"demo/__init__.py", "demo/seed.py", "demo/shapes.py"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.build(tmp_path_factory.mktemp("zip"), Progress())


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.unpack(archive, tmp_path_factory.mktemp("unpacked") / "unguide")


def test_the_zip_holds_what_a_user_needs_and_nothing_else(archive: Path) -> None:
    names = package.sizes(archive)
    assert {name for name in names if "/" not in name} == FILES
    assert {name.split("/")[0] for name in names if "/" in name} == SHIPPED
    demo = {name for name in names if name.startswith("demo/") and not name.startswith(package.DEMO_WEIGHTS)}
    assert demo == DEMO_CODE
    assert len([name for name in names if name.startswith("demo/loras/")]) == 10


def test_the_package_passes_every_check(archive: Path, unpacked: Path) -> None:
    assert package.check(archive, unpacked, Host.from_environment().python, Progress()) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nodes/run.py", "import subprocess\n", "imports subprocess"),
        ("nodes/run.py", "from pip import main\n", "imports pip"),
        ("nodes/run.py", "import os\nos.system('ls')\n", "calls os.system"),
        ("nodes/run.py", "eval('1')\n", "calls eval"),
        ("nodes/run.py", "import torch\ntorch.load('x')\n", "without weights_only"),
        ("nodes/run.py", "from ..demo import train\nfrom .gone import x\n", "imports nodes/gone, which is missing"),
        ("demo/model.ckpt", "", "may be a pickle"),
    ],
)
def test_what_could_run_other_code_or_is_missing_is_refused(
    archive: Path, tmp_path: Path, name: str, content: str, words: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    found = [*package._dangerous(tmp_path), *package._missing(tmp_path)]
    assert any(words in what for what in found), found


@pytest.fixture(scope="module")
def bare(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI with the zip in custom_nodes, and without a model, a LoRA or another custom node."""
    host = package.install(archive, tmp_path_factory.mktemp("bare"), Host.from_environment())
    with running_server(host) as server:
        yield server


def test_the_zip_in_a_bare_comfyui_runs_a_template_to_an_image_and_a_verdict(bare: Server) -> None:
    served = json.loads(bare.api.request(f"/api/workflow_templates/unguide/{package.QUICK_START}.json"))
    graph = workflow.to_api(served, bare.api.get("/object_info"))
    entry = bare.api.run(graph)
    images = bare.api.images(entry)
    assert workflow.node_of_type(graph, "SaveImage") in images
    (text,) = [output["text"][0] for output in entry["outputs"].values() if "text" in output]
    assert "detected" in text.lower()
    assert "cat" in text


def test_every_template_finds_its_nodes_and_files_in_a_bare_comfyui(bare: Server) -> None:
    """Those that start from a checkpoint of the user's need that one file and no other."""
    object_info = bare.api.get("/object_info")
    (stems,) = bare.api.get("/workflow_templates").values()
    for stem in stems:
        served = json.loads(bare.api.request(f"/api/workflow_templates/unguide/{stem}.json"))
        for node in workflow.to_api(served, object_info).values():
            for name, kind, _, options in workflow.specified(object_info[node["class_type"]]):
                value = node["inputs"].get(name)
                if kind == "COMBO" and not isinstance(value, list) and options.get("options"):
                    assert value in options["options"], f"{stem}: {node['class_type']}.{name}"


def test_the_workflows_on_github_run_commands_that_exist_and_the_pinned_comfy_cli() -> None:
    paths = sorted((PACK / ".github" / "workflows").glob("*.yml"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    assert all(yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"] for path in paths)
    assert set(re.findall(r"python3 dev (\S+)", text)) <= set(commands())
    assert re.findall(r"comfy-cli==\S+", text) == [package.COMFY_CLI]


def test_the_project_is_named_and_described_for_the_registry() -> None:
    project = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^name = "unguide"$', project, re.MULTILINE)
    (repository,) = re.findall(r'^Repository = "https://github.com/(\S+)"$', project, re.MULTILINE)
    for key in ("Icon", "Banner"):
        (url,) = re.findall(rf'^{key} = "(\S+)"$', project, re.MULTILINE)
        path = url.removeprefix(f"https://raw.githubusercontent.com/{repository}/main/")
        assert (PACK / path).is_file(), url
