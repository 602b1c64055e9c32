"""`python -m unguide_bench` as a person runs it, on real ComfyUIs with the demo model."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dev.host import Host
from dev.server import LOOPBACK, Server, free_port, running_server
from tests.bench.conftest import CAT, DOG, KITTY, LORA, STEPS, arguments
from tests.conftest import ROOT
from unguide_bench.cli import main
from unguide_bench.folder import RECORDS
from unguide_core.adapter.card import Card
from unguide_core.formats import load_adapter, save_adapter

pytestmark = pytest.mark.host
METHODS = ("base", "negative", "lora", "before")
FEW = ("base", "lora")
NAMES = ["base", "negative prompt", "LoRA 1", "UnGuide before sampling"]


@pytest.fixture(scope="module")
def finished(server: Server, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the documented command, run to its end in a process of its own, judged by the demo's classifier."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = arguments(prompts, out, "--server", server.api.url, "--methods", *METHODS, "--judge", "demo")
    command = [sys.executable, "-P", "-m", "unguide_bench", *options]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tables = [line.split(" | ")[0] for line in run.stdout.splitlines() if line.startswith("| ")]
    assert tables == ["| method", "| ---", *(f"| {name}" for name in NAMES)] * 2
    assert "24/24" in run.stderr
    return out


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def generated(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The lines of a folder by method, prompt and seed, with the image's bytes."""
    lines = [json.loads(line) for line in (folder / RECORDS).read_text(encoding="utf-8").splitlines()]
    return {(one["method"], one["prompt"], one["seed"]): {**one, "png": pixels(folder / one["file"])} for one in lines}


def pixels(file: Path) -> bytes:
    from PIL import Image

    return Image.open(file).convert("RGB").tobytes()


def test_every_method_generates_every_prompt_and_seed_at_its_cost(finished: Path) -> None:
    found = generated(finished)
    assert set(found) == {(name, prompt, seed) for name in NAMES for prompt in (CAT, KITTY, DOG) for seed in (0, 1)}
    plain = {one["evaluations"] for key, one in found.items() if key[0] != "UnGuide before sampling"}
    assert plain == {2 * STEPS}
    guided = {key[1]: one["evaluations"] for key, one in found.items() if key[0] == "UnGuide before sampling"}
    assert guided == dict.fromkeys((CAT, KITTY, DOG), 2 * STEPS)  # decided by the prompt's text
    assert all(one["seconds"] > 0 for one in found.values())


def test_the_gates_decision_is_noted_and_what_it_spares_is_the_base_models_image(finished: Path) -> None:
    found = generated(finished)
    for prompt, detected in ((CAT, True), (KITTY, True), (DOG, False)):
        for seed in (0, 1):
            guided, base = found["UnGuide before sampling", prompt, seed], found["base", prompt, seed]
            assert guided["detected"] is detected
            assert (guided["score"] > guided["threshold"]) is detected
            assert (guided["png"] == base["png"]) is not detected
            assert base["detected"] is None
            for other in ("negative prompt", "LoRA 1"):
                assert found[other, prompt, seed]["png"] != base["png"]


def test_the_scores_are_those_of_the_images(finished: Path) -> None:
    found = results(finished)
    assert set(found["scores"]) == set(NAMES)
    base, lora, guided = (found["scores"][name] for name in ("base", "LoRA 1", "UnGuide before sampling"))
    assert [base[name] for name in ("acc_e", "acc_s", "acc_g")] == [100.0, 100.0, 100.0]
    for erased in (lora, guided):
        assert [erased[name] for name in ("acc_e", "acc_s", "acc_g")] == [0.0, 100.0, 0.0]
    assert (guided["recall"], guided["false_alarms"]) == (100.0, 0.0)
    assert guided["max_abs_diff_unrelated"] == 0.0
    assert lora["max_abs_diff_unrelated"] > 0
    assert found["shares"]["base"]["erased"]["pictures"] == 2
    assert found["settings"]["checkpoint"].startswith("unguide-demo")
    assert (guided["identical_unrelated"], lora["identical_unrelated"]) == (100.0, 0.0)
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Erasure of &#39;cat&#39;" in page
    assert "data:image/png;base64," in page


def test_nudenet_looks_at_the_same_images_and_counts_by_method(finished: Path, prompts: Path, capsys) -> None:
    """The demo model generates emoji: there is nothing to detect, and every image is judged."""
    assert main(arguments(prompts, finished, "--methods", *METHODS, "--judge", "nudenet")) == 0
    assert {name: counts["pictures"] for name, counts in results(finished)["nudity"].items()} == dict.fromkeys(NAMES, 6)
    assert "| base | 6 | 0 | 0 |" in capsys.readouterr().out


def test_an_interrupted_run_generates_only_what_is_missing_and_the_same(
    server: Server, finished: Path, prompts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    lines = (folder / RECORDS).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / RECORDS).write_text("".join(lines[:-2]) + lines[-2][:30], encoding="utf-8")
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert main(arguments(prompts, folder, "--server", server.api.url, "--methods", *METHODS)) == 0
    written = [path for path, when in kept.items() if path.stat().st_mtime_ns != when]
    assert len(written) == 2
    before, after = generated(finished), generated(folder)
    assert {key: one["png"] for key, one in before.items()} == {key: one["png"] for key, one in after.items()}


@pytest.fixture(scope="module")
def official_lora() -> Iterator[str]:
    """The demo's erasure LoRA in the official format, among the host's LoRAs while these tests run."""
    loras = Host.from_environment().base_directory / "models" / "loras"
    folder = loras / "unguide-bench-tests"
    folder.mkdir(exist_ok=True)
    save_adapter(replace(load_adapter(loras / LORA), card=Card()), folder / "cat.pth", format="official")
    yield "unguide-bench-tests/cat.pth"
    shutil.rmtree(folder)


def test_a_lora_that_the_hosts_loader_does_not_read_is_generated_at_weight_zero_and_gets_the_prompt_of_the_file(
    server: Server, finished: Path, prompts: Path, official_lora: str, tmp_path: Path
) -> None:
    options = ("--methods", "lora", "always", "--server", server.api.url, "--limit", "1")
    assert main(arguments(prompts, tmp_path / "run", *options, seeds=1, lora=official_lora)) == 0
    found = generated(tmp_path / "run")
    assert found["LoRA 1", CAT, 0]["png"] == found["UnGuide always, weight 0", CAT, 0]["png"]
    by_host = generated(finished)["LoRA 1", CAT, 0]["png"]
    apart = [abs(a - b) for a, b in zip(found["LoRA 1", CAT, 0]["png"], by_host, strict=True)]
    assert max(apart) <= 2
    assert results(tmp_path / "run")["how"]["concept_prompt"] == CAT


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--checkpoint", "sd-v9.safetensors", "has no ckpt_name 'sd-v9.safetensors'; it has unguide-demo.safetensors"),
        ("--lora", "none.pth", "has no lora_name 'none.pth'; it has"),
        ("--sampler", "ddpm2", "has no sampler_name 'ddpm2'; it has euler"),
    ],
)
def test_what_the_server_lacks_is_named_with_what_it_has(
    server: Server, prompts: Path, tmp_path: Path, capsys, option: str, value: str, words: str
) -> None:
    assert main([*arguments(prompts, tmp_path / "run", "--server", server.api.url), option, value]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_address_without_a_server_is_one_sentence(prompts: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(prompts, tmp_path / "run", "--server", f"{LOOPBACK}:{free_port()}")) == 1
    assert "does not answer" in capsys.readouterr().err


def test_an_address_of_something_else_is_one_sentence(prompts: Path, tmp_path: Path, capsys) -> None:
    with http.server.HTTPServer((LOOPBACK, 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        assert main(arguments(prompts, tmp_path / "run", "--server", f"{LOOPBACK}:{other.server_port}")) == 1
        other.shutdown()
    assert "does not answer like a ComfyUI" in capsys.readouterr().err


@contextmanager
def when_generated(folder: Path, events: dict[int, Callable[[], None]]) -> Iterator[None]:
    """Within the block each action is taken as soon as so many images are generated, and all by its end."""
    over, waiting = threading.Event(), dict(events)

    def watch() -> None:
        while waiting and not over.is_set():
            count = len((folder / RECORDS).read_bytes().splitlines()) if (folder / RECORDS).exists() else 0
            for number in [number for number in waiting if number <= count]:
                waiting.pop(number)()
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    assert not waiting


def kill_one_worker() -> None:
    """Kills one of this process' Ray workers, as a machine that fails does."""
    workers = [
        child for child in psutil.Process().children(recursive=True) if "ray::Worker" in " ".join(child.cmdline())
    ]
    assert workers
    workers[0].kill()


def test_a_killed_server_and_a_killed_worker_lose_nothing(
    server: Server, finished: Path, prompts: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "run"
    with running_server(Host.from_environment()) as second:

        def kill_the_server() -> None:
            os.killpg(second.process.pid, signal.SIGKILL)

        urls = ("--server", second.api.url, server.api.url)
        with when_generated(folder, {2: kill_one_worker, 5: kill_the_server}):
            assert main(arguments(prompts, folder, "--methods", *FEW, *urls)) == 0
        alone = arguments(prompts, folder, "--methods", "base", "--server", second.api.url, seeds=3)
        assert main(alone) == 1
    assert "does not answer" in capsys.readouterr().err
    before, after = generated(finished), generated(folder)
    assert len(after) == 12
    assert {key: one["png"] for key, one in after.items()} == {key: before[key]["png"] for key in after}
