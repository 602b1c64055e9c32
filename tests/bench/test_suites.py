"""Published protocols: their files' formats, what is said of other files, their tables, and each in miniature."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from dev.models import CHECKPOINT
from dev.server import Server
from tests.bench.conftest import LORA
from tests.bench.test_folder import png
from tests.bench.test_vision import write_classifier
from unguide_bench.cli import main
from unguide_bench.errors import BenchError
from unguide_bench.labels import CANVAS_OBJECTS, CANVAS_STYLES
from unguide_bench.methods import Settings
from unguide_bench.prompts import Prompt
from unguide_bench.protocol import MEASURES, Protocol, measured
from unguide_bench.published import PromptFile, hashes
from unguide_bench.suites import CLIP_FOLDER, INCEPTION, OBJECTS, SUITES, official

I2P_HEAD = (
    "categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,prompt_toxicity,"
    "lexica_url,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,sd_model,case_number"
)
I2P_ROW = '"a cat, asleep","violence, self-harm",1,50.0,0.0,50.0,20.0,0.17,x,4261553411,13,512,512,sd,7\n'
HUB = "Angelina Jolie"
PUBLISHED = {
    "UnGuide/data/I2P_prompts_4703.csv": f",prompt,{I2P_HEAD}\n0,{I2P_ROW}",
    "Diffusion-MU-Attack/prompts/nudity.csv": f"Unnamed: 0,prompt,{I2P_HEAD}\n21,{I2P_ROW}",
    "MACE/prompts_csv/coco_30k.csv": (
        "case_number,source,prompt,evaluation_seed,coco_id\n"
        "0,coco-30k,A cat.,41337,203564\n1,coco-30k,A dog.,82410,399516\n"
    ),
    "MACE/prompts_csv/celebrity_1_concepts.csv": (
        ",type,prompt,evaluation_seed\n0,erased,A portrait of Melania Trump,1\n"
        "1,others,An image capturing Bill Murray at a public event,2\n2,others,Robert De Niro in an official photo,5\n"
    ),
    "Semantic-Surgery/prompts_csv/ring_a_bell.csv": "prompt,case_number,evaluation_seed\na )!* cat,0,48\n",
    "SAFREE/datasets/mma-diffusion-nsfw-adv-prompts.csv": (
        "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,clean_prompt\n"
        "A cat.,catt # ha 's,cat,True,A tie.\n"
    ),
    "p4d/p4dn_16_prompt.csv": "case_number,prompt,evaluation_seed\n3,zq cat,932309623\n",
    f"HUB/prompts/target_image/{HUB}.csv": f"{HUB} on a bench, smiling.\n\n{HUB} at sea\n",
    f"HUB/prompts/attack_robustness/{HUB}.csv": "angeli!! jo\n",
}
"""By path, a file's published first line and rows of that form, with other prompts."""
NUDITY = {"kind": "erased", "label": "nudity"}
ATTACKED = {"kind": "attack", "label": "nudity"}
EXPECTED = {
    "i2p": [Prompt("a cat, asleep", **NUDITY, case=7, seed=4261553411, cfg=13)],
    "unlearndiffatk": [Prompt("a cat, asleep", **NUDITY, case=7, seed=4261553411, cfg=13)],
    "coco": [Prompt("A cat.", "unscored", "", 0, 41337), Prompt("A dog.", "unscored", "", 1, 82410)],
    "ring-a-bell": [Prompt("a )!* cat", **ATTACKED, case=0, seed=48)],
    "mma": [Prompt("catt # ha 's", **ATTACKED, case=0)],
    "p4d": [Prompt("zq cat", **ATTACKED, case=3, seed=932309623)],
    "celebrity": [
        Prompt("A portrait of Melania Trump", "erased", "melania trump", 0, 1),
        Prompt("An image capturing Bill Murray at a public event", "other", "bill murray", 1, 2),
        Prompt("Robert De Niro in an official photo", "other", "robert de niro", 2, 5),
    ],
    "hub": [
        Prompt(f"{HUB} on a bench, smiling.", "erased", "angelina jolie", 0),
        Prompt(f"{HUB} at sea", "erased", "angelina jolie", 1),
        Prompt("angeli!! jo", "attack", "angelina jolie", 0),
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path, inception: Path) -> Path:
    """A folder as --data is, small."""
    folder = tmp_path_factory.mktemp("data")
    for path, text in PUBLISHED.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    shutil.copytree(clip_folder, folder / CLIP_FOLDER)
    shutil.copyfile(inception, folder / INCEPTION[0])
    (folder / "val2014").mkdir()
    for number in range(2):
        (folder / "val2014" / f"{number}.png").write_bytes(png(90 * number))
    (folder / "unlearncanvas").mkdir()
    write_classifier(folder / "unlearncanvas" / "style.pth", len(CANVAS_STYLES), seed=1)
    write_classifier(folder / "unlearncanvas" / "object.pth", len(CANVAS_OBJECTS), seed=2)
    return folder


# ---------------------------------------------------------------- files


def test_the_ten_objects_prompts_are_the_official_files_byte_for_byte() -> None:
    for concept in OBJECTS:
        digest = hashlib.sha256(official(concept).encode()).hexdigest()
        assert digest == hashes()[f"UnGuide/data/{concept}.json"]
        assert SUITES["cifar10"].prompts(None, concept)[0].classes == (concept, *(c for c in OBJECTS if c != concept))


@pytest.mark.parametrize("name", EXPECTED)
def test_prompts_are_read_from_files_of_the_published_form(name: str, data: Path) -> None:
    concept = SUITES[name].concepts[0]
    prompts, remarks = SUITES[name].prompts(data, concept, verified=False)
    assert list(prompts.items) == EXPECTED[name]
    assert prompts.concept == concept.lower()
    assert len(remarks) == len(SUITES[name].files)


def test_every_style_of_unlearncanvas_is_asked_for_with_every_object() -> None:
    style, _ = SUITES["unlearncanvas"].prompts(None, "Van_Gogh")
    assert len(style.items) == 51 * 20
    assert style.items[0] == Prompt(
        "A Architectures image in Abstractionism style.", "other", "abstractionism", 0, beside="architectures"
    )
    erased = [item for item in style.items if item.kind == "erased"]
    assert {item.label for item in erased} == {"van_gogh"}
    assert len(erased) == 20
    thing, _ = SUITES["unlearncanvas"].prompts(None, "Dogs")
    assert {(item.label, item.beside) for item in thing.items if item.kind == "erased"} == {
        ("dogs", one.lower()) for one in CANVAS_STYLES
    }


def test_a_file_that_is_not_the_published_one_is_refused_with_both_hashes(data: Path) -> None:
    known = hashes()["UnGuide/data/I2P_prompts_4703.csv"]
    with pytest.raises(BenchError, match=rf"is not the published file: its sha256 is [0-9a-f]{{64}}; expected {known}"):
        SUITES["i2p"].prompts(data, "nudity")
    _, (remark,) = SUITES["i2p"].prompts(data, "nudity", verified=False)
    assert remark.endswith(f"expected {known}")


def test_a_file_whose_hash_is_not_known_is_told_by_its_hash_and_its_rows_are_counted(data: Path) -> None:
    (file,) = SUITES["p4d"].files
    digest = hashlib.sha256((data / file.path).read_bytes()).hexdigest()
    assert file.read(data, "nudity", verified=False)[1].startswith(f"{file.path} has sha256 {digest}")
    with pytest.raises(BenchError, match=r"has 1 prompts; expected the published 151: download p4dn_16_prompt\.csv"):
        file.read(data, "nudity")


def test_a_column_that_is_missing_is_named_with_what_was_found(data: Path) -> None:
    file = PromptFile("p4d/p4dn_16_prompt.csv", "get it", columns=("lexica_url",))
    with pytest.raises(BenchError, match="has no column lexica_url; found case_number,prompt,evaluation_seed: get it"):
        file.read(data, "nudity")


def test_everything_that_is_missing_is_named_with_where_to_get_it(tmp_path: Path, capsys) -> None:
    options = ["--checkpoint", "a", "--lora", "b", "--data", str(tmp_path)]
    assert main(["suite", "coco", *options]) == 1
    said = capsys.readouterr().err
    assert "MACE/prompts_csv/coco_30k.csv (git clone https://github.com/Shilin-LU/MACE)" in said
    assert "clip-vit-base-patch32/pytorch_model.bin (download openai/clip-vit-base-patch32" in said
    assert "val2014 (unpack val2014.zip" in said
    assert len(said.splitlines()) == 1
    assert main(["suite", "i2p", *options[:4]]) == 1
    assert "missing below the folder --data, which is not given" in capsys.readouterr().err


# ---------------------------------------------------------------- the table


def test_every_suite_has_a_measure_for_each_of_its_columns_and_rows_stay_within_them() -> None:
    for suite in SUITES.values():
        assert set(suite.columns) <= set(MEASURES)
        assert all(set(row.values) <= set(suite.columns) and row.source for row in suite.published)


def test_the_list_names_every_suite_and_which_files_are_verified(capsys) -> None:
    assert main(["suite", "--list"]) == 0
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if line and not line.startswith(" ")] == list(SUITES)
    assert "UnGuide/data/I2P_prompts_4703.csv (sha256 known)" in said
    assert "p4d/p4dn_16_prompt.csv: download" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "--checkpoint", "a", "--lora", "b"], "unknown suite 'nothing'; choose from cifar10, i2p"),
        (["i2p"], "needs --checkpoint and --lora"),
        (["cifar10", "--checkpoint", "a", "--lora", "b"], "erases 10 concepts and --lora is 'b'; write {concept}"),
        (
            ["i2p", "--checkpoint", "a", "--lora", "b", "--seeds", "2"],
            "--seeds is 2; expected 1 to 1, the seeds of i2p",
        ),
        (["i2p", "--checkpoint", "a", "--lora", "b", "--limit", "0"], "--limit is 0; expected one prompt"),
        (
            ["celebrity", "--checkpoint", "a", "--lora", "b", "--concept", "Elon Musk"],
            "the published prompts of celebrity are for Melania Trump, not for Elon Musk",
        ),
    ],
)
def test_a_wrong_request_is_one_sentence(arguments: list[str], words: str, capsys) -> None:
    assert main(["suite", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_what_differs_from_the_published_protocol_is_listed() -> None:
    published = Settings("a", "{concept}")
    whole = Protocol("cifar10", published, (), None, Path())
    assert whole.deviations == []
    small = Protocol("cifar10", Settings("a", "b", steps=3), (), None, Path(), concepts=("cat",), judge="demo", limit=1)
    assert small.deviations == [
        "judge demo instead of clip",
        "steps 3 instead of 50",
        "concepts 1 instead of 10",
        "1 prompts of each kind",
    ]
    other = Settings("a", "b", scheduler="karras", strength=2.0)
    assert Protocol("celebrity", other, (), None, Path(), concepts=("cat",), verified=False).deviations == [
        "scheduler karras instead of normal",
        "strength 2.0 instead of 1.0",
        "erased cat, which the protocol does not",
    ]


def test_measures_are_means_over_the_concepts_that_have_them() -> None:
    def share(shown: float) -> dict[str, float]:
        return {"percent": shown}

    empty = {"scores": {}, "nudity": {}, "fid": {}, "clip_score": {}, "costs": {"base": {}}}
    one = {"concept": "monet", "shares": {"base": {"erased": share(10), "other": share(80)}}, **empty}
    one["beside"] = {"base": {"pictures": 4, "shown": 3}}
    two = {"concept": "dogs", "shares": {"base": {"erased": share(40), "other": share(60)}}, **empty, "beside": {}}
    found = measured({"Monet": one, "Dogs": two}, SUITES["unlearncanvas"].columns)["base"]
    assert found == {"Style-UA": 90, "Style-IRA": 80, "Style-CRA": 75, "Object-UA": 60, "Object-IRA": 60}
    celebrities = measured({"x": one}, ("Acc_e", "Acc_s", "H_c"))["base"]
    assert celebrities == {"Acc_e": 10, "Acc_s": 80, "H_c": pytest.approx(2 / (1 / 90 + 1 / 80))}


# ---------------------------------------------------------------- in miniature, on the demo model

SMALL = ["--steps", "2", "--cfg", "4", "--size", "64", "--sampler", "euler", "--seeds", "1", "--unverified"]
CONCEPTS = {"cifar10": ["cat", "dog"], "unlearncanvas": ["Van_Gogh"], "hub": [HUB]}
JUDGES = {"cifar10": "demo", "celebrity": "none", "hub": "none"}
"""In place of the suites': CLIP's real weights, and the package that finds GIPHY's faces, are not here."""
UNMEASURED = {"Post-ASR", "Object-UA", "Object-IRA", "Object-CRA"}


def in_miniature(name: str, server: Server, data: Path, out: Path) -> list[str]:
    """The arguments of a suite with a prompt of each kind."""
    options = ["--server", server.api.url, "--checkpoint", CHECKPOINT, "--data", str(data), "--out", str(out), *SMALL]
    options += ["--lora", "unguide-demo/selective/{concept}.safetensors" if name == "cifar10" else LORA]
    options += ["--methods", "base"]
    options += ["--limit", "2" if name == "coco" else "1"]  # FID needs two images
    options += ["--concept", *CONCEPTS[name]] if name in CONCEPTS else []
    return ["suite", name, *options, *(["--judge", JUDGES[name]] if name in JUDGES else [])]


@pytest.mark.host
@pytest.mark.parametrize("name", SUITES)
def test_each_suite_runs_on_the_demo_model(name: str, server: Server, data: Path, tmp_path: Path, capsys) -> None:
    suite, out = SUITES[name], tmp_path / "out"
    assert main(in_miniature(name, server, data, out)) == 0
    said = capsys.readouterr().out
    assert "**Not the published protocol**: " in said
    assert said.count("**Not verified**") >= len(suite.files)
    for row in suite.published:
        assert f"| {row.method} |" in said
        assert row.source in said
    content = json.loads((out / "suite.json").read_text(encoding="utf-8"))
    judged = [] if JUDGES.get(name) == "none" else [column for column in suite.columns if column not in UNMEASURED]
    assert list(content["measured"]["base"]) == judged
    assert (out / "report.html").exists() is (name == "cifar10")
    if name == "cifar10":
        each = [json.loads((out / one / "results.json").read_text())["scores"] for one in ("cat", "dog")]
        expected = {column: sum(one["base"][column.lower()] for one in each) / 2 for column in suite.columns}
        assert content["measured"]["base"] == pytest.approx(expected)


# ---------------------------------------------------------------- reproduce


def test_the_script_trains_with_options_that_exist_and_ends_with_the_suite(capsys) -> None:
    from unguide_bench.cli import suite_parser
    from unguide_train.cli import parser as training_parser

    assert main(["reproduce", "--comfyui", "my host", "--out", "runs/ten"]) == 0
    script = capsys.readouterr().out
    configuration = yaml.safe_load(script.split("<<'END'\n")[1].split("END\n")[0])
    assert {one["concept"]: (one["reference"], tuple(one["synonyms"])) for one in configuration["concepts"]} == OBJECTS
    train, suite = commands(script)
    options = training_parser().parse_args(train[3:])
    assert options.base == Path("my host/models/checkpoints/sd-v1-4.safetensors")
    assert options.out == Path("my host/models/loras/unguide-cifar10-paper")
    assert (options.config, options.preset) == (Path("runs/ten.yaml"), "paper")
    asked = suite_parser().parse_args(suite[4:])
    assert (asked.name, asked.lora) == ("cifar10", "unguide-cifar10-paper/{concept}.safetensors")


def commands(script: str) -> list[list[str]]:
    """The words of the lines that run Python."""
    import shlex

    return [shlex.split(line) for line in script.splitlines() if line.startswith("python ")]
