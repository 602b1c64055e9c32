"""The direction of dependencies: unguide_core <- unguide_comfy <- nodes, unguide_core <- unguide_train, no other.

unguide_policy stands beside nodes. unguide_bench stands apart: it asks a running ComfyUI, and of the demo it has the
judge."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "node_helpers", "server"}
OURS = {"unguide_core", "unguide_comfy", "unguide_policy", "unguide_train", "unguide_bench"}
OURS |= {"nodes", "demo", "experiments", "dev", "tests"}
EXTRAS = {"accelerate", "diffusers", "matplotlib", "nudenet", "peft", "pydantic", "ray", "torchmetrics", "transformers"}
EXTRAS |= {"jinja2", "yaml"}

# what each package may not import, neither at import time nor inside a function
FORBIDDEN = {
    "unguide_core": OURS - {"unguide_core"} | HOST | EXTRAS,
    "unguide_comfy": OURS - {"unguide_core", "unguide_comfy"} | EXTRAS,
    "nodes": OURS - {"unguide_core", "unguide_comfy", "nodes", "demo"} | EXTRAS | {"numpy", "PIL", "safetensors"},
    "unguide_policy": OURS - {"unguide_core", "unguide_comfy", "unguide_policy"} | EXTRAS - {"yaml"},
    "unguide_train": OURS - {"unguide_core", "unguide_train"} | HOST,
    "unguide_bench": OURS - {"unguide_core", "unguide_bench", "demo"} | HOST,
}

# the bridge's folders in the order that the data takes: each imports only from itself and from those before it
BRIDGE = ("model", "lora", "blend", "probe", "report", "gate", "train", "erase")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and first name of every absolute import; a relative one is named by the folder it leads into."""
    package = path.relative_to(REPOSITORY).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, str(node.module).split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            inside = package[: len(package) - node.level + 1]
            targets = [str(node.module)] if node.module else [alias.name for alias in node.names]
            yield from ((node.lineno, inside[0] if inside else target.split(".")[0]) for target in targets)


def bridge_folders(path: Path) -> Iterator[tuple[int, str]]:
    """Line and folder of every import from a folder of the bridge."""
    package = path.relative_to(REPOSITORY).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                target = [part for part in (*inside, alias.name) if part]
                if target[0] == "unguide_comfy":
                    yield node.lineno, target[1]


def modules(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def violations(paths: list[Path], forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for path in paths
        for line, name in imports(path)
        if name in forbidden
    ]


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_a_package_imports_only_what_lies_below_it(package):
    assert violations(modules(package), FORBIDDEN[package]) == []


def test_the_bridges_folders_import_only_those_before_them():
    paths = modules("unguide_comfy")
    assert {path.parent.name for path in paths} == {"unguide_comfy", *BRIDGE}
    backwards = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {folder}"
        for path in paths
        for line, folder in bridge_folders(path)
        if folder not in BRIDGE or path.parent.name not in BRIDGE[BRIDGE.index(folder) :]
    ]
    assert backwards == []


def test_the_core_imports_the_standard_library_torch_and_safetensors_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "safetensors", "unguide_core"}
    foreign = [
        (path.name, name) for path in modules("unguide_core") for _, name in imports(path) if name not in allowed
    ]
    assert foreign == []


def test_the_core_imports_itself_relatively_for_the_host_loads_the_pack_under_a_name_of_its_own():
    absolute = [
        f"{path.name}:{node.lineno}"
        for path in modules("unguide_core")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).startswith("unguide_core")
    ]
    assert absolute == []


def test_the_demo_knows_the_host_only_where_it_trains():
    paths = [path for path in modules("demo") if not path.stem.startswith("train")]
    assert violations(paths, HOST | {"unguide_comfy", "unguide_train", "nodes"}) == []


def test_dev_knows_no_method_and_no_tensors():
    method = {"torch", "numpy", "unguide_core", "unguide_comfy", "unguide_train"}
    paths = [path for path in modules("dev") if path.parent.name != "site"]  # lives in the environment
    assert violations(paths, method) == []


def test_one_node_alone_knows_the_demo_and_of_it_only_the_seed():
    demo = "from ..demo import seed"
    text = {path.name: path.read_text(encoding="utf-8") for path in modules("nodes")}
    assert [name for name, code in text.items() if "..demo" in code] == ["demo.py"]
    assert text["demo.py"].count("..demo") == text["demo.py"].count(demo) == 1


def test_the_seeds_reader_needs_torch_and_safetensors_alone_for_it_ships():
    allowed = {*sys.stdlib_module_names, "torch", "safetensors", "demo"}
    paths = [REPOSITORY / "demo" / f"{name}.py" for name in ("__init__", "seed", "shapes")]
    assert {(path.name, name) for path in paths for _, name in imports(path) if name not in allowed} == set()


def test_the_benchmarks_client_needs_the_standard_library_alone_for_dev_shares_it():
    standard = {*sys.stdlib_module_names, "unguide_bench"}
    paths = [REPOSITORY / "unguide_bench" / f"{name}.py" for name in ("__init__", "api", "errors", "labels")]
    assert [(path.name, name) for path in paths for _, name in imports(path) if name not in standard] == []


def test_only_the_judge_of_the_demo_knows_the_demo():
    paths = [path for path in modules("unguide_bench") if path.name != "demo.py"]
    assert violations(paths, {"demo"}) == []


def test_the_packs_root_imports_nothing_of_the_host_at_import_time():
    tree = ast.parse((REPOSITORY / "__init__.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {str(node.module) if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top}
    assert not {name.split(".")[0] for name in names} & (HOST | OURS)


def test_importing_the_whole_core_loads_no_host_and_no_heavy_package():
    names = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in modules("unguide_core")
        if path.stem not in ("__init__", "__main__")
    ]
    code = (
        f"import sys; sys.path.append({str(REPOSITORY)!r}); "
        f"import {', '.join(names)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "torch" in loaded
    assert not loaded & (HOST | EXTRAS | {"unguide_comfy", "nodes", "pandas", "scipy", "PIL"})


def test_reading_a_card_needs_the_standard_library_only():
    file = REPOSITORY / "demo" / "loras" / "selective" / "cat.safetensors"
    code = (
        f"import sys; sys.path.append({str(REPOSITORY)!r}); from unguide_core.adapter.card import read_card; "
        f"print(read_card({str(file)!r}).concept, *{{name.split('.')[0] for name in sys.modules}})"
    )
    alone = [sys.executable, "-I", "-S", "-c", code]  # without any installed package
    run = subprocess.run(alone, capture_output=True, text=True, check=True)
    concept, *loaded = run.stdout.split()
    assert concept == "cat"
    assert set(loaded) <= {*sys.stdlib_module_names, "unguide_core", "__main__"}


@pytest.mark.parametrize(
    "module", ["", ".adapter", ".adapter.card", ".adapter.names", ".training.prompts", ".training.layers"]
)
def test_what_needs_no_tensors_does_not_load_torch(module):
    code = (
        f"import sys; sys.path.append({str(REPOSITORY)!r}); import unguide_core{module}; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
