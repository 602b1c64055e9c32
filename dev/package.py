"""The zip that the registry would get: built by comfy-cli from what git tracks and `.comfyignore` leaves, and checked.

comfy-cli has an environment of its own in the cache folder, for it asks for much that ComfyUI does not need.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from dev import cache, workflow, workspace
from dev.environment import create
from dev.host import Host
from dev.pip import clean_environment, pip
from dev.report import DevError, Progress
from dev.server import running_server
from dev.workspace import PACK

COMFY_CLI = "comfy-cli==1.23.0"
TOOL_MEGABYTES = 500
QUICK_START = "1_quick_start"
LIMIT, LIMIT_BESIDES_DEMO = 17_000_000, 2_000_000
LIMIT_SECONDS = 60
"""From the zip to the first erased image, without the start of the server."""
DEMO_WEIGHTS = ("demo/demo_model.safetensors", "demo/loras/")
# may run code when they are opened
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")
FORBIDDEN_MODULES = {"subprocess", "pip", "ensurepip", "marshal", "multiprocessing", "ctypes"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}


def build(out: Path, progress: Progress) -> Path:
    """The zip in the folder `out`, named as the project and its version."""
    comfy = comfy_cli(progress)
    out.mkdir(parents=True, exist_ok=True)
    project = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    name, version = (_value(project, key) for key in ("name", "version"))
    target = out / f"{name}-{version}.zip"
    with cache.locked(cache.home() / "tools", progress):  # comfy-cli writes into the checkout, always to one name
        progress("comfy node pack")
        said = run_comfy(comfy, ["node", "pack"], PACK)
        made = PACK / "node.zip"
        if not made.is_file():
            raise DevError(f"comfy node pack made no file and said '{said}'")
        os.replace(made, target)
    return target


def _value(project: str, key: str) -> str:
    """A text of pyproject.toml's first table; Python 3.10 has no reader of such files."""
    found = re.search(rf'^{key} = "(.+)"$', project, re.MULTILINE)
    if not found:
        raise DevError(f"pyproject.toml names no {key}")
    return found[1]


def comfy_cli(progress: Progress) -> Path:
    """The program `comfy`, installed where it is missing."""
    folder = cache.home() / "tools" / "comfy-cli"
    with cache.locked(folder.parent, progress):
        if cache.stamped_inputs(folder) != cache.digest(COMFY_CLI):
            cache.discard(folder)
            cache.require_space(folder.parent, TOOL_MEGABYTES, "comfy-cli")
            progress(f"installing {COMFY_CLI}")
            create(folder)
            log = cache.home() / "logs" / "pip-comfy-cli.log"
            pip(folder / "bin" / "python", "install", COMFY_CLI, log=log, purpose="installing comfy-cli")
            cache.stamp(folder, cache.digest(COMFY_CLI))
    return folder / "bin" / "comfy"


def run_comfy(comfy: Path, arguments: list[str], folder: Path) -> str:
    """What comfy-cli printed. It keeps its settings in the cache folder, and reports to nobody.

    Raises: DevError with its last line where it fails.
    """
    environment = clean_environment() | {"HOME": str(comfy.parent.parent), "DO_NOT_TRACK": "1", "NO_COLOR": "1"}
    result = subprocess.run(
        [str(comfy), "--skip-prompt", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    said = (result.stdout + result.stderr).strip()
    if result.returncode != 0:
        raise DevError(f"comfy {' '.join(arguments)} failed and said '{(said.splitlines() or ['nothing'])[-1]}'")
    return said


def sizes(archive: Path) -> dict[str, int]:
    """Bytes of every file in the zip, unpacked, by name."""
    with zipfile.ZipFile(archive) as opened:
        return {entry.filename: entry.file_size for entry in opened.infolist() if not entry.is_dir()}


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks the zip as an installation does, and returns the folder."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return folder


def install(archive: Path, base: Path, host: Host) -> Host:
    """The host with an empty base directory into which only the zip is unpacked: no model, no LoRA, no other node."""
    workspace.make_folders(base)
    unpack(archive, base / "custom_nodes" / workspace.LINK)
    return replace(host, base_directory=base)


def first_image(host: Host, stem: str = QUICK_START) -> dict[str, float]:
    """Runs a template as it ships on a server that is started for it. Returns seconds: `start`, then `run`.

    Raises: DevError if it saved no image, or erased nothing.
    """
    started = time.perf_counter()
    with running_server(host) as server:
        ready = time.perf_counter()
        served = server.api.get(f"/api/workflow_templates/{workspace.LINK}/{stem}.json")
        graph = workflow.to_api(served, server.api.get("/object_info"))
        entry = server.api.run(graph)
        if not server.api.images(entry).get(workflow.node_of_type(graph, "SaveImage")):
            raise DevError(f"{stem} saved no image")
        report = entry["outputs"].get(workflow.node_of_type(graph, "PreviewAny"), {}).get("text", [""])[0]
        if "and erased it" not in report:
            raise DevError(f"{stem} erased nothing; it reports '{report.partition(chr(10))[0]}'")
        return {"start": ready - started, "run": time.perf_counter() - ready}


def check(archive: Path, folder: Path, python: Path, progress: Progress) -> list[str]:
    """What is wrong with the package, one phrase each.

    Args:
        folder: the zip, unpacked.
        python: the host's, which has comfy-test.
    """
    wrong = [*_too_large(archive), *_dangerous(folder), *_missing(folder)]
    progress("comfy node validate")
    said = run_comfy(comfy_cli(progress), ["node", "validate"], folder)
    if "All validation checks passed" not in said or "Warning" in said:
        wrong.append(f"comfy node validate says: {said}")
    progress("comfy-test")
    levels = [str(python), str(PACK / "dev" / "offline_levels.py"), str(folder)]
    if subprocess.run(levels, cwd=folder, env=clean_environment(), stdout=sys.stderr).returncode != 0:
        wrong.append("comfy-test fails, see above")
    return wrong


def _too_large(archive: Path) -> Iterator[str]:
    if archive.stat().st_size > LIMIT:
        yield f"the zip has {archive.stat().st_size} bytes; expected {LIMIT} at most"
    besides = sum(size for name, size in sizes(archive).items() if not name.startswith(DEMO_WEIGHTS))
    if besides > LIMIT_BESIDES_DEMO:
        yield f"the files beside the demo's weights have {besides} bytes; expected {LIMIT_BESIDES_DEMO} at most"


def _dangerous(folder: Path) -> Iterator[str]:
    """Files that could run code when opened, and code that could run or install other programs."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in PICKLES:
            yield f"{name} may be a pickle"
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if what := _forbidden(node):
                    yield f"{name}:{node.lineno} {what}"  # type: ignore[attr-defined]


def _forbidden(node: ast.AST) -> str:
    """What is forbidden about this piece of code; "" if nothing."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [str(node.module)] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        if found := {name.split(".")[0] for name in names} & FORBIDDEN_MODULES:
            return f"imports {', '.join(sorted(found))}"
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in FORBIDDEN_CALLS or called.startswith(("os.system", "os.popen", "pickle.", "importlib.import_")):
            return f"calls {called}"
        if called == "torch.load" and "weights_only=True" not in ast.unparse(node):
            return "calls torch.load without weights_only=True"
    return ""


def _missing(folder: Path) -> Iterator[str]:
    """Modules that a shipped module imports and that do not ship."""
    for path in sorted(folder.rglob("*.py")):
        package = PurePosixPath(path.relative_to(folder).as_posix()).parts[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            inside = folder.joinpath(*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            if not inside.is_dir() and not inside.with_suffix(".py").is_file():
                yield f"{path.relative_to(folder)}:{node.lineno} imports {inside.relative_to(folder)}, which is missing"
