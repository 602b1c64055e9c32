"""A run's folder: what is kept, what is generated again, what is refused; and what is read from it."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unguide_bench.errors import BenchError
from unguide_bench.export import export
from unguide_bench.folder import Folder
from unguide_bench.generating import Servers, generate_missing, jobs_of
from unguide_bench.generator import GeneratedImage, Plan
from unguide_bench.graphs import Job
from unguide_bench.judging import judged
from unguide_bench.methods import Method, Settings
from unguide_bench.panel import Judging, require
from unguide_bench.prompts import Prompt, Prompts
from unguide_bench.scores import read_images

SETTINGS = Settings("a.safetensors", "b.safetensors", steps=3, size=64)
PLAN = Plan(SETTINGS, lora_by_host=True, plain={True: 6.0}, gate={"on_detection": "automatic"})
CAT, KITTY, DOG = "a photo of the cat", "a photo of the kitty", "a photo of the dog"
PROMPTS = Prompts(
    "cat", (Prompt(CAT, "erased", "cat", 0), Prompt(KITTY, "synonym", "cat", 1), Prompt(DOG, "other", "dog", 2)), CAT
)
BASE, GUIDED = Method("base"), Method("during")
JOBS = jobs_of(PROMPTS, (BASE, GUIDED), (0, 1), 7.5)


def png(value: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(data, "PNG")
    return data.getvalue()


def filled(path: Path, jobs: list[Job] = JOBS) -> Folder:
    """A folder with a grey image for each job; the guided ones are 3 levels brighter where the concept is detected."""
    folder = Folder(path, SETTINGS)
    folder.begin(SETTINGS, PLAN)
    for job in jobs:
        detected = job.prompt != DOG
        if job.method == BASE:
            folder.add(job, GeneratedImage(png(100), 1.0, 6.0))
        else:
            folder.add(job, GeneratedImage(png(100 + 3 * detected), 1.5, 7.0, detected, 0.9 if detected else 0.1, 0.5))
    return folder


def test_jobs_go_through_one_method_after_the_other_and_a_prompts_own_seed_and_guidance_win() -> None:
    prompts = Prompts("x", (Prompt("p", "erased", "x", 0), Prompt("q", "erased", "x", 1, seed=42, cfg=3.0)))
    jobs = jobs_of(prompts, (BASE, GUIDED), (0, 1), 7.5)
    own = [("p", 0, 7.5), ("p", 1, 7.5), ("q", 42, 3.0)]
    assert [(job.prompt, job.seed, job.cfg) for job in jobs] == own * 2
    assert [job.method for job in jobs] == [BASE] * 3 + [GUIDED] * 3


def test_what_was_generated_is_known_after_a_restart(tmp_path: Path) -> None:
    before = filled(tmp_path / "run", JOBS[:5])
    again = Folder(tmp_path / "run", SETTINGS)
    assert again.generated == before.generated
    assert again.missing(JOBS) == JOBS[5:]
    assert again.missing([JOBS[5], JOBS[5]]) == [JOBS[5]]
    generate_missing(again, SETTINGS, JOBS[:5], CAT, Servers(()))  # nothing is missing, so no server is asked
    with pytest.raises(BenchError, match=r"7 images are missing in .*; give a ComfyUI with --server"):
        generate_missing(again, SETTINGS, JOBS, CAT, Servers(()))


def test_a_run_that_was_interrupted_in_the_middle_of_a_line_generates_that_image_again(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run", JOBS[:3])
    lines = folder.path / "generated.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])
    again = Folder(folder.path, SETTINGS)
    assert again.missing(JOBS[:3]) == [JOBS[2]]
    again.add(JOBS[2], GeneratedImage(png(100), 1.0, 6.0))
    assert Folder(folder.path, SETTINGS).missing(JOBS[:3]) == []


def test_an_image_whose_file_is_gone_is_generated_again(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run", JOBS[:3])
    (folder.path / folder.generated["base", KITTY, 0, 7.5].file).unlink()
    assert Folder(folder.path, SETTINGS).missing(JOBS[:3]) == [JOBS[2]]


def test_a_damaged_line_elsewhere_is_told(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run", JOBS[:2])
    lines = folder.path / "generated.jsonl"
    lines.write_text("what\n" + lines.read_text())
    with pytest.raises(BenchError, match=r"generated.jsonl, line 1 is damaged"):
        Folder(folder.path, SETTINGS)


def test_other_settings_than_the_folders_are_refused_by_name(tmp_path: Path) -> None:
    filled(tmp_path / "run", JOBS[:1])
    with pytest.raises(BenchError, match=r"steps 3 \(now 50\); size 64 \(now 512\); choose another folder"):
        Folder(tmp_path / "run", replace(SETTINGS, steps=50, size=512))


def test_a_server_with_other_defaults_than_before_is_refused(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run", JOBS[:1])
    with pytest.raises(BenchError, match=r"generated with .*\"automatic\".* now generates with .*\"restart\""):
        folder.begin(SETTINGS, replace(PLAN, gate={"on_detection": "restart"}))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"x")
    with pytest.raises(BenchError, match="not the folder of a run"):
        Folder(tmp_path, SETTINGS)
    with pytest.raises(BenchError, match="not the folder of a run"):
        Folder(tmp_path / "holiday.png", SETTINGS)
    assert list(tmp_path.iterdir()) == [tmp_path / "holiday.png"]


def test_without_a_judge_costs_and_differences_are_measured(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    results = judged(folder, JOBS, PROMPTS, Judging())
    assert results["costs"]["base"] == {"pictures": 6, "evaluations": 6.0, "seconds": 1.0}
    assert results["costs"]["UnGuide during sampling"]["evaluations"] == 7.0
    assert (results["scores"], results["shares"]) == ({}, {})
    images = list(read_images(folder.path / "images.jsonl"))
    apart = {(p.method, p.prompt): (p.difference, p.max_difference) for p in images}
    assert apart["UnGuide during sampling", DOG] == (0.0, 0.0)
    assert apart["UnGuide during sampling", CAT] == (3.0, 3.0)
    assert {p.detected for p in images if p.method == "base"} == {None}
    assert json.loads((folder.path / "results.json").read_text())["concept"] == "cat"
    assert "| UnGuide during sampling | 6 | 7.0 | 1.50 |" in (folder.path / "results.md").read_text()


@pytest.mark.parametrize(
    ("jobs", "judge", "reason"),
    [
        (JOBS, "none", "no judge was asked for; give one with --judge"),
        (JOBS[6:], "demo", "the method 'base', to compare with, was not run; add it to --methods"),
        (JOBS[:3], "demo", "method 'base' has no image of kind 'other' for 'cat'; generate some"),
        (JOBS[:5], "demo", r"generated with \[1, 2\] seeds; expected the same for all"),
        (JOBS, "nudenet", "NudeNet does not tell what else an image shows"),
    ],
)
def test_results_say_why_there_are_no_scores(tmp_path: Path, jobs: list[Job], judge: str, reason: str) -> None:
    results = judged(filled(tmp_path / "run", jobs), jobs, PROMPTS, Judging(judge))
    assert results["scores"] == {}
    assert re.search(reason, results["no_scores"])
    assert re.search(f"No Acc_e, Acc_s, Acc_g and H_o: .*{reason}", results["tables"])


def test_prompts_without_a_class_are_why_there_are_no_scores(tmp_path: Path) -> None:
    unlabelled = replace(PROMPTS, items=(*PROMPTS.items[:2], replace(PROMPTS.items[2], label="")))
    results = judged(filled(tmp_path / "run"), JOBS, unlabelled, Judging("demo"))
    assert results["no_scores"] == "4 images' prompts do not say which class they ask for; add a column 'classes'"


def test_a_prompt_that_a_file_has_twice_counts_twice(tmp_path: Path) -> None:
    twice = replace(PROMPTS, items=(*PROMPTS.items, PROMPTS.items[0]))
    jobs = jobs_of(twice, (BASE,), (0,), 7.5)
    assert judged(filled(tmp_path / "run", jobs), jobs, twice, Judging())["costs"]["base"]["pictures"] == 4


def test_a_folder_without_images_has_nothing_to_judge(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="there are no images"):
        judged(Folder(tmp_path / "run", SETTINGS), JOBS, PROMPTS, Judging())


@pytest.mark.parametrize("options", [{"judge": "clip"}, {"clip_score": True}, {"fid": "base"}])
def test_clips_weights_are_asked_for_before_anything_is_generated(options: dict) -> None:
    with pytest.raises(BenchError, match="give the folder of a download with --clip"):
        Judging(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"judge": "clip", "clip": Path("nowhere")}, "CLIP folder nowhere has no config.json, no model.safetensors or"),
        ({"fid": "nowhere", "clip": Path("nowhere")}, "the folder nowhere does not exist"),
        ({"fid": "base", "fid_weights": Path("nowhere.pth")}, "nowhere.pth does not exist; give InceptionV3's weights"),
    ],
)
def test_what_a_judge_lacks_is_reported_before_anything_is_generated(options: dict, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        require(Judging(**options))


def test_images_are_exported_as_others_tools_want_them(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    assert export(folder, JOBS, PROMPTS, tmp_path / "out") == {"base": 6, "UnGuide during sampling": 6}
    with open(tmp_path / "out" / "base" / "prompts.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[4] == {
        "case_number": "4",
        "prompt": DOG,
        "evaluation_seed": "0",
        "evaluation_guidance": "7.5",
        "classes": "dog",
    }
    for row in rows:
        file = tmp_path / "out" / "base" / row["classes"] / f"{int(row['case_number']):05d}.png"
        record = folder.generated["base", row["prompt"], int(row["evaluation_seed"]), 7.5]
        assert file.read_bytes() == (folder.path / record.file).read_bytes()
    with pytest.raises(BenchError, match="not an empty folder; choose another with --export"):
        export(folder, JOBS, PROMPTS, tmp_path / "out")
