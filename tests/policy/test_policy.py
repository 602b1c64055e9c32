"""Policy files, the start of a server, and the log: no model is loaded."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from typing import Any

import comfy.model_base
import comfy.samplers
import pytest
import torch

from dev import cache, host
from dev.report import Progress
from tests.conftest import ROOT, pack_module

LORA = ROOT / "demo" / "loras" / "selective" / "cat.safetensors"
CAT = "a photo of the cat"
TEXT = """\
version: 1
adapters:
  cat: {{file: cat.safetensors, sha256: "{sha256}", concept: a photo of the cat}}
models:
  demo: {{weights: "abc", adapters: [cat]}}
"""


@pytest.fixture
def policy(tmp_path):
    """A function that writes a policy with its adapter and prompts, changed, and returns its file."""
    prompts = pack_module("unguide_policy.prompts")
    module = pack_module("unguide_policy.policy")
    (tmp_path / "cat.safetensors").write_bytes(LORA.read_bytes())
    file = tmp_path / "policy.yaml"

    def write(change=lambda text: text, encoded=("concept", "neutral")):
        file.write_text(change(TEXT.format(sha256=module.sha256(LORA))), encoding="utf-8")
        states = [[torch.zeros(1, 77, 768), {"pooled_output": torch.ones(1, 768)}]]
        prompts.save_prompts({("abc", "cat", kind): states for kind in encoded}, prompts.prompts_file(file))
        return file

    return write


def test_a_policy_is_read_with_its_adapters_and_prompts(policy):
    loaded = pack_module("unguide_policy.policy").load(policy())
    assert loaded.loras["demo", "cat"].strength == 1.5
    assert not loaded.adapters["cat"].settings(gated=True).text_clears
    lora = loaded.loras["demo", "cat"]
    assert lora.concept_prompt == CAT
    assert lora.concept[0][0].shape == (1, 77, 768)
    assert lora.neutral[0][1]["pooled_output"].shape == (1, 768)


def test_what_a_policy_does_not_say_is_refused(policy):
    loaded = pack_module("unguide_policy.policy").load(policy())
    rules = (loaded.other_models, loaded.undecidable, loaded.training, loaded.outside, loaded.models["demo"].patched)
    assert set(rules) == {"refuse"}
    assert loaded.tell_clients is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text + "patch: refuse\n", "unknown key 'patch'"),
        (lambda text: text + "file: other.yaml\n", "unknown key 'file'"),
        (lambda text: text.replace("concept:", "concpt:"), "unknown key 'concpt'"),
        (lambda text: text.replace("cat: {file", "cat: {strength: 0, file"), "strength is 0; expected a number"),
        (lambda text: text.replace("version: 1", "version: 2"), "version: 1"),
        (lambda text: text + "training: maybe\n", "training is 'maybe'; expected one of refuse, pass"),
        (lambda text: text + "training: pass\ntraining: refuse\n", "'training' occurs twice"),
        (lambda text: text + "tell_clients: perhaps\n", "tell_clients is 'perhaps'"),
        (lambda text: text.replace("[cat]", "[dog]"), "dog, which are not under 'adapters'"),
        (lambda text: text.replace("[cat]", "[]"), "at least one adapter"),
        (lambda text: text.replace('sha256: "', 'sha256: "0'), "restore the file"),
        (lambda text: text.replace('"abc"', "12"), "weights is 12; expected a text"),
        (lambda text: text.replace("file: cat.", "file: dog."), "No such file"),
        (lambda text: "", "version: 1"),
        (lambda text: text + "  : [", "while"),
    ],
)
def test_a_wrong_policy_ends_the_start_with_one_sentence(change, said, policy, monkeypatch):
    monkeypatch.setenv("UNGUIDE_POLICY", str(policy(change)))
    before = attributes()
    with pytest.raises(SystemExit) as ended:
        pack_module("unguide_policy").install()
    assert said in str(ended.value)
    assert str(ended.value).startswith("UnGuide: this server does not start, because its policy")
    assert "\n" not in str(ended.value)
    assert attributes() == before


def test_missing_prompts_and_a_missing_policy_end_the_start(policy, monkeypatch, tmp_path):
    for file, said in ((policy(encoded=("concept",)), "neutral prompt"), (tmp_path / "none.yaml", "No such file")):
        monkeypatch.setenv("UNGUIDE_POLICY", str(file))
        with pytest.raises(SystemExit, match=said):
            pack_module("unguide_policy").install()


def test_a_policy_where_clients_write_ends_the_start(monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setenv("UNGUIDE_POLICY", str(tmp_path / "policy.yaml"))
    with pytest.raises(SystemExit, match="move the policy's folder elsewhere"):
        pack_module("unguide_policy").install()


@pytest.mark.parametrize("owner", [comfy.samplers.CFGGuider, comfy.model_base.BaseModel])
def test_a_host_whose_functions_changed_ends_the_start(owner, policy, monkeypatch):
    name = "sample" if owner is comfy.samplers.CFGGuider else "apply_model"

    def changed(self, noise, image):
        pass

    changed.__qualname__ = getattr(owner, name).__qualname__
    monkeypatch.setattr(owner, name, changed)
    monkeypatch.setenv("UNGUIDE_POLICY", str(policy()))
    with pytest.raises(SystemExit, match="takes \\(self noise image\\)"):
        pack_module("unguide_policy").install()


def attributes() -> dict[str, int]:
    """What the host's modules and classes hold that a policy could change."""
    import execution

    import nodes

    owners = (comfy.samplers, comfy.samplers.CFGGuider, comfy.model_base, comfy.model_base.BaseModel, execution, nodes)
    return {f"{owner.__name__}.{name}": id(value) for owner in owners for name, value in vars(owner).items()}


def test_without_a_policy_no_attribute_of_the_host_changes(monkeypatch):
    monkeypatch.delenv("UNGUIDE_POLICY", raising=False)
    before = attributes()
    pack_module("unguide_policy").install()
    assert attributes() == before


@pytest.mark.parametrize("version", list(host.RELEASES))
def test_every_pinned_host_has_both_functions_with_the_known_parameters(version):
    home = cache.home()
    with cache.locked(home / "hosts" / version, Progress()):
        folder = host.fetch(host.release(version), home, Progress())
    for name, parameters in pack_module("unguide_policy.hooks").SIGNATURES.items():
        owner, function = name.split(".")
        file = {"CFGGuider": "samplers.py", "BaseModel": "model_base.py"}[owner]
        tree = ast.parse((folder / "comfy" / file).read_text(encoding="utf-8"))
        (kind,) = [one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == owner]
        (found,) = [one for one in kind.body if isinstance(one, ast.FunctionDef) and one.name == function]
        given = found.args
        names = [*(one.arg for one in given.args), *([given.kwarg.arg] if given.kwarg else [])]
        assert " ".join(names) == parameters


def test_the_hooks_keep_the_hosts_signatures(arm):
    before = inspect.signature(comfy.samplers.CFGGuider.sample)
    arm()
    assert inspect.signature(comfy.samplers.CFGGuider.sample) == before


# the log


def line(day: str, action: str, detected: list[bool]) -> dict[str, Any]:
    adapter = {"adapter": "cat", "concept": CAT, "detected": detected, "action": action}
    return {"time": f"{day}T00:00:00Z", "images": len(detected), "action": action, "adapters": [adapter]}


def test_the_log_is_summarised_by_day_and_concept_without_a_host(tmp_path):
    file = tmp_path / "policy.jsonl"
    lines = [
        line("2026-11-01", "erase", [True, False]),
        line("2026-11-01", "none", [False]),
        line("2026-11-02", "refuse", [True]),
        {"time": "2026-11-02T01:00:00Z", "images": 4, "action": "refuse", "adapters": []},
    ]
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    command = [sys.executable, "-m", "unguide_policy", "log", str(file)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in said.splitlines()[2:]]
    assert rows == [
        ["2026-11-01", CAT, "3", "1", "0"],
        ["2026-11-01", "all", "3", "1", "0"],
        ["2026-11-02", CAT, "1", "1", "1"],
        ["2026-11-02", "all", "5", "1", "5"],
    ]


def test_half_a_line_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "policy.jsonl"
    file.write_text('{"time": ')
    with pytest.raises(ValueError, match="line 1 of"):
        pack_module("unguide_policy.log").read_log(file)
