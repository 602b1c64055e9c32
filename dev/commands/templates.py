"""`python3 dev templates`: writes workflows/, what the server runs of them, and subgraphs/, from dev/templates.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dev import prepare
from dev.inside import run_inside
from dev.layout import blueprint, workflow
from dev.report import Progress
from dev.server import running_server
from dev.templates import BLUEPRINTS, TEMPLATES
from dev.workflow import to_api
from dev.workspace import PACK

SUMMARY = "write workflows/*.json from their descriptions, after a change of a node or a template"
TWINS = PACK / "tests" / "fixtures" / "workflows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)
    parser.add_argument(
        "--thumbnails", nargs="*", metavar="STEM", help="run them too, all or those named, and write workflows/*.jpg"
    )


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    host = prepare.prepare(arguments, progress)
    with running_server(host) as server:
        object_info = server.api.get("/object_info")
    for template in TEMPLATES:
        made = workflow(template, object_info)
        for folder, content in ((PACK / "workflows", made), (TWINS, to_api(made, object_info))):
            write(folder / f"{template.stem}.json", content)
    for wanted in BLUEPRINTS:
        write(PACK / "subgraphs" / f"{wanted.name}.json", blueprint(wanted, object_info))
    print(f"{len(TEMPLATES)} workflows and {len(BLUEPRINTS)} blueprints written")
    if arguments.thumbnails is None:
        return 0
    return run_inside("dev.thumbnails", arguments, arguments.thumbnails, progress)


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON as the files of this repository have it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
