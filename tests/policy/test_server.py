"""A policy on a real server, over HTTP: a handful of the graphs of `python3 dev policy`."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.host import Host
from dev.report import DevError
from dev.server import Server
from experiments.policy.graphs import CAT, CONCEPT, Draft, cases
from experiments.policy.main import labels
from experiments.policy.narrow import narrow_is_recognised, write_demo, write_policy
from experiments.policy.servers import policy_server, show
from tests.conftest import pack_module


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_demo(Host.from_environment(), folder)
    return folder


@pytest.fixture(scope="module")
def policy(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("policy") / "policy.yaml"
    write_policy(demo, file)
    return file


@pytest.fixture(scope="module")
def server(demo: Path, policy: Path) -> Iterator[Server]:
    with policy_server(Host.from_environment(), demo, policy) as running:
        yield running


@pytest.fixture(scope="module")
def by_name(server: Server):
    return {case.name: case for case in cases(server.api.get("/object_info"), 1)}


def test_there_are_at_least_sixty_graphs(by_name):
    assert len(by_name) >= 60


@pytest.mark.parametrize("name", ["KSampler, cat", "node expansion, cat", "in the negative prompt, cfg 0"])
def test_the_concept_is_not_shown(name, server, by_name):
    shown = show(server, by_name[name])
    assert len(shown.images) == 1
    assert CONCEPT not in labels(shown.images)


def test_an_unrelated_image_is_shown(server, by_name):
    assert labels(show(server, by_name["KSampler, ship"]).images) == ["ship"]


@pytest.mark.parametrize(
    "name", ["LoraLoaderModelOnly, the adapter at -1", "a hook with the adapter at -1", "training, the host's"]
)
def test_a_refusal_reaches_the_client_without_a_path_of_the_pack(name, server, by_name):
    shown = show(server, by_name[name])
    assert shown.refused
    assert "Refused" in shown.details
    assert not any(word in shown.details for word in ("unguide_policy", "unguide_comfy"))


def test_every_run_has_a_line_in_the_log_and_none_has_a_clients_text(server, policy):
    log = policy.with_name("policy.jsonl")
    before = len(log.read_text().splitlines())
    draft = Draft("a photo of the ship, SECRET", 1)
    prompt_id = server.api.queue(draft.saved(draft.ksampler(steps=3)))
    server.api.wait(prompt_id)
    (line,) = log.read_text().splitlines()[before:]
    assert json.loads(line)["prompt_id"] == prompt_id
    assert "SECRET" not in line


def test_clients_see_nothing_of_the_policy(server):
    assert set(server.api.get("/unguide/policy")) == {"armed", "version"}
    logs = json.dumps(server.api.get("/internal/logs"))
    assert "Detected" not in logs
    assert "unguide_policy" not in logs


def test_a_server_with_a_broken_policy_does_not_start(demo, tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("version: 1\nadaptors: {}\n")
    with (
        pytest.raises(DevError, match="ends with 'UnGuide: this server does not start"),
        policy_server(Host.from_environment(), demo, file),
    ):
        pass


def test_check_says_what_clients_can_do(policy):
    with narrow_is_recognised():
        said = pack_module("unguide_policy.command").check(Namespace(policy=policy))
    assert f"{CAT!r} (cat): erased where it is detected" in said
    assert "Verified" in said


def test_init_does_not_overwrite_a_policy(policy):
    with pytest.raises(FileExistsError, match="remove it"):
        pack_module("unguide_policy.command").init(Namespace(policy=policy))
