"""The page's texts in other languages: as complete as the English ones."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dev.workspace import PACK

LOCALES, HELP = PACK / "locales", PACK / "web" / "docs"
LANGUAGES = ("de", "es", "fr", "ja", "ko", "pt-BR", "ru", "zh", "zh-TW")
WITH_HELP = ("ja", "zh")
FILES = ("main.json", "nodeDefs.json")
MEANT_FOR_VUE = re.compile(r"[@{}|]")
"""Characters that the page's texts may not have: they mean something to its library."""


def texts(language: str, name: str) -> dict[str, str]:
    content = json.loads((LOCALES / language / name).read_text(encoding="utf-8"))
    return dict(leaves(content))


def leaves(content: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", value


def test_every_language_is_known_here() -> None:
    assert {path.name for path in LOCALES.iterdir()} == {"en", *LANGUAGES}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_says_all_that_english_says_in_words_of_its_own(language: str, name: str) -> None:
    english, translated = texts("en", name), texts(language, name)
    assert list(translated) == list(english)
    for key, text in translated.items():
        assert text.strip(), key
        assert not MEANT_FOR_VUE.search(text), key
        assert len(english[key].split()) <= 3 or text != english[key], key


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_and_what_a_user_types_are_the_same(language: str) -> None:
    english, translated = texts("en", "nodeDefs.json"), texts(language, "nodeDefs.json")
    for key, text in english.items():
        numbers = re.findall(r"\d[\d.]*\d|\d", text)
        assert all(number in re.sub(r"(\d),(\d)", r"\1.\2", translated[key]) for number in numbers), key
        typed = [word for word in re.findall(r"(?<!\w)'([a-z_, ]+?)'(?!\w)", text) if not word.startswith("prompt")]
        assert all(word in translated[key] for word in typed), key


@pytest.mark.parametrize("language", WITH_HELP)
def test_every_nodes_help_is_translated_with_its_tables_and_pictures(language: str) -> None:
    pages = sorted(HELP.glob("*.md"))
    assert pages
    for page in pages:
        there = (HELP / page.stem / f"{language}.md").read_text(encoding="utf-8")
        here = page.read_text(encoding="utf-8")
        for mark in (r"^#+ ", r"^\|", r"!\[[^\]]*\]\([^)]*\)"):
            assert len(re.findall(mark, there, re.M)) == len(re.findall(mark, here, re.M)), (page.stem, mark)
        pictures = r"!\[[^\]]*\]\(([^)]*)\)"
        assert re.findall(pictures, there) == re.findall(pictures, here), page.stem


def test_help_is_kept_for_known_nodes_alone() -> None:
    folders = [path for path in HELP.iterdir() if path.is_dir()]
    assert {path.name for path in folders} == {path.stem for path in HELP.glob("*.md")}
    for folder in folders:
        assert {path.stem for path in Path(folder).iterdir()} == set(WITH_HELP)
