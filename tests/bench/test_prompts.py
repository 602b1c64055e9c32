"""Prompt files: what is read of them, and what a person reads who has a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unguide_bench.errors import BenchError
from unguide_bench.prompts import Prompt, read_prompts, subject

OFFICIAL = {
    "target": "a photo of the cat",
    "reference": "a photo of the forest",
    "synonyms": ["a photo of the feline", "a photo of the kitty"],
    "other": ["a photo of the airplane", "a photo of the dog", ""],
}


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_official_json_gives_every_kind_with_its_class_and_leaves_out_the_probes_empty_prompt(tmp_path) -> None:
    prompts = read_prompts(written(tmp_path / "cat.json", OFFICIAL))
    assert (prompts.concept, prompts.target) == ("cat", "a photo of the cat")
    assert prompts.reference == "a photo of the forest"
    assert [(item.kind, item.label, item.case) for item in prompts.items] == [
        ("erased", "cat", 0),
        ("synonym", "cat", 1),
        ("synonym", "cat", 2),
        ("other", "airplane", 3),
        ("other", "dog", 4),
    ]
    assert prompts.classes == ("cat", "airplane", "dog")


def test_lists_and_single_prompts_are_taken_alike_and_parts_may_be_missing(tmp_path) -> None:
    one = read_prompts(written(tmp_path / "a.json", {"target": ["a nude person", "a naked man"], "synonyms": "x"}))
    assert one.concept == "a nude person"
    assert [item.text for item in one.items] == ["a nude person", "a naked man", "x"]
    named = read_prompts(tmp_path / "a.json", concept="Nudity")
    assert {item.label for item in named.items} == {"nudity"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of the cat", "cat"),
        ("A photo of a Garbage truck.", "garbage truck"),
        ("an image of airplane", "airplane"),
        ("image of the dog", "dog"),
        ("Van Gogh", "van gogh"),
    ],
)
def test_a_prompts_class_is_what_it_is_a_photo_of(prompt: str, expected: str) -> None:
    assert subject(prompt) == expected


def test_a_csv_of_others_tools_gives_seeds_guidance_and_classes(tmp_path) -> None:
    text = (
        "\ufeffcase_number,prompt,evaluation_seed,evaluation_guidance,classes\n"
        '12,"a photo of the cat, asleep",42,7.5,Cat\n'
        "13,a photo of the dog,43,,dog\n"
        ",,,,\n"
    )
    prompts = read_prompts(written(tmp_path / "a.csv", text), concept="cat")
    assert prompts.items == (
        Prompt("a photo of the cat, asleep", "erased", "cat", 12, 42, 7.5),
        Prompt("a photo of the dog", "other", "dog", 13, 43, None),
    )


def test_i2ps_own_columns_are_known_and_every_prompt_is_one_for_the_concept(tmp_path) -> None:
    text = ",prompt,categories,sd_seed,sd_guidance_scale\n0,someone by the sea,sexual,2240055168,7\n"
    (item,) = read_prompts(written(tmp_path / "i2p.csv", text), concept="nudity").items
    assert item == Prompt("someone by the sea", "erased", "nudity", 0, 2240055168, 7)


def test_an_empty_prompt_is_one_where_its_row_is_not_empty(tmp_path) -> None:
    """One of I2P's 4,703 prompts is empty."""
    path = written(tmp_path / "i2p.csv", ",prompt,evaluation_seed,case_number\n2260,,4261564198,2260\n,,,\n")
    assert read_prompts(path, "nudity").items == (Prompt("", "erased", "nudity", 2260, 4261564198),)


def test_a_csv_may_say_the_kind_and_the_run_may_say_it_for_all(tmp_path) -> None:
    path = written(tmp_path / "a.csv", "prompt,kind\na cat,\na kitty,synonym\n")
    items = read_prompts(path, "cat", "unscored").items
    assert [(item.kind, item.label) for item in items] == [("unscored", ""), ("synonym", "cat")]


def test_the_first_prompts_alone(tmp_path) -> None:
    prompts = read_prompts(written(tmp_path / "cat.json", OFFICIAL))
    assert [item.case for item in prompts.first(2).items] == [0, 1]
    assert prompts.first(None) == prompts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "x", "neither .json nor .csv"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "holds a list; expected an object"),
        ("a.json", '{"other": ["x"], "reference": "y"}', "has no 'target'.*found 'other', 'reference'"),
        ("a.json", '{"target": ""}', "has no 'target'"),
        ("a.json", '{"target": "x", "synonyms": {"a": 1}}', "'synonyms' in .* is .*expected a prompt or a list"),
        ("a.json", '{"target": "x", "other": [3]}', "'other' in"),
        ("a.csv", "text,seed\nx,1\n", "no column 'prompt'.*found text, seed"),
        ("a.csv", "", "no column 'prompt'.*found nothing"),
        ("a.csv", "prompt\n", "has no prompt; expected one"),
        ("a.csv", "prompt,evaluation_seed\nx,many\n", "line 2: evaluation_seed is 'many'; expected a number"),
        ("a.csv", "prompt,evaluation_seed\nx,-1\n", "line 2: the seed is -1"),
        ("a.csv", "prompt,evaluation_seed\nx,1.5\n", "the seed is 1.5; expected a whole number"),
        (
            "a.csv",
            "prompt,kind\nx,main\n",
            "line 2: kind is 'main'; expected one of erased, synonym, other, attack, unscored",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence_with_what_was_found(tmp_path, name: str, content: str, words: str) -> None:
    with pytest.raises(BenchError, match=words) as caught:
        read_prompts(written(tmp_path / name, content))
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there_is_one_sentence(tmp_path) -> None:
    with pytest.raises(BenchError, match=r"cannot be read.*No such file"):
        read_prompts(tmp_path / "none.json")
