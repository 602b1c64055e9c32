"""Runs every graph on a real server without a policy and on one with it, and tells what each shows.

Run by `python3 dev policy`. The demo's classifier says what an image shows; an unrelated image has to be the same file.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo.classifier import LABELS, classify
from dev.api import NoAnswerError, seconds_of
from dev.host import Host
from dev.report import DevError
from dev.server import Server
from experiments.policy.graphs import CAT, CONCEPT, FORBIDDEN, GUARDED, SHIP, UNRELATED, Case, Draft, cases, put_back
from experiments.policy.narrow import write_demo, write_policy
from experiments.policy.servers import Shown, outcome, policy_server, show
from experiments.runner import keep, publish
from unguide_bench.tables import markdown

TIMES = 24
"""Runs of the unrelated image whose overhead is measured, on either server."""

BAD = ("unguarded", "changed", "failed")


@dataclass(frozen=True)
class Row:
    """One graph.

    Args:
        without, with_: what its images show without and with the policy; "refused", or an error.
        identical: whether they are the same files; None unless the graph is unrelated to the concept.
        evaluations: model evaluations (NFE) per image without and with the policy, None where it is refused.
        status: "erased", "refused", "blank", "identical", or what went wrong: "unguarded", "changed", "failed".
    """

    name: str
    without: str
    with_: str
    identical: bool | None
    evaluations: tuple[float, float] | None
    status: str


def row(case: Case, before: Shown, after: Shown, lines: Sequence[dict[str, Any]]) -> Row:
    """Return what a case comes to, by what it shows on both servers and the policy's log."""
    runs = [line for line in lines if line["prompt_id"] == after.prompt_id and "plain" in line]
    evaluations = (sum(line["plain"] for line in runs), sum(line["evaluations"] for line in runs)) if runs else None
    same = before.images == after.images
    identical = same if case.kind == UNRELATED else None
    return Row(case.name, said(before), said(after), identical, evaluations, status(case.kind, before, after))


def status(kind: str, before: Shown, after: Shown) -> str:
    """Return the one word for a case."""
    if after.refused:
        return "changed" if kind == UNRELATED else "refused"
    if kind == FORBIDDEN:
        return "unguarded"
    if not after.images:
        return "failed" if before.images or kind == UNRELATED else "refused"
    if kind == UNRELATED:
        return "identical" if before.images == after.images else "changed"
    if CONCEPT in labels(after.images):
        return "unguarded"
    return "blank" if all(map(is_blank, after.images)) else "erased"


def said(shown: Shown) -> str:
    """Return what the images show, in words; or why there are none."""
    if shown.images:
        return ", ".join(f"{label} x{count}" for label, count in Counter(labels(shown.images)).items())
    return "refused" if shown.refused else f"error: {shown.error}"


def labels(files: Iterable[bytes]) -> list[str]:
    """Return what the classifier sees in each image file; "unclear" where it gives no class more than half."""
    found = [classify(pixels(png)[None])[0] for png in files]
    return [LABELS[int(each.argmax())] if float(each.max()) > 0.5 else "unclear" for each in found]


def pixels(png: bytes) -> Any:
    """Return an image file as uint8 [H, W, 3]."""
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def is_blank(png: bytes) -> bool:
    """Return whether an image has no content: hardly any contrast."""
    return bool(pixels(png).astype(float).std() < 8.0)


# ------------------------------------------------------------------ what one server does with all cases


def shown_by(server: Server, chosen: Sequence[Case]) -> list[Shown]:
    """Return what each case comes to on a server, with progress."""
    began, found = time.monotonic(), []
    for number, case in enumerate(chosen, start=1):
        found.append(show(server, case))
        if number % 20 == 0:
            sys.stderr.write(f"{number} of {len(chosen)} graphs, {time.monotonic() - began:.0f} s\n")
    return found


def queued(server: Server, images: int) -> list[tuple[Case, Shown]]:
    """Queue four graphs at once, concept and ship in turn, and return what they come to."""
    drafts = [(prompt, Draft(prompt, images)) for prompt in (CAT, SHIP, CAT, SHIP)]
    graphs = [(prompt, draft.saved(draft.ksampler(seed=number))) for number, (prompt, draft) in enumerate(drafts)]
    ids = [server.api.queue(graph) for _, graph in graphs]
    found = []
    for number, ((prompt, graph), prompt_id) in enumerate(zip(graphs, ids, strict=True), start=1):
        kind = GUARDED if prompt == CAT else UNRELATED
        found.append((Case(f"queue of four, number {number}", (graph,), kind), outcome(server, prompt_id)))
    return found


def stopped_in_mid_run(server: Server) -> Shown:
    """Queue a long run of the concept, stop the server during it, and return what it has written by then."""
    draft = Draft(CAT, 1)
    prompt_id = server.api.queue(draft.saved(draft.ksampler(steps=400)))
    while not server.api.get("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(2.0)
    server.stop()
    try:
        server.api.get(f"/history/{prompt_id}")
    except (NoAnswerError, DevError):
        return Shown(error="this server was stopped", prompt_id=prompt_id)
    raise DevError("the server answers after it was stopped")


def overhead(host: Host, demo: Path, policy: Path) -> tuple[list[float], list[float]]:
    """Return the seconds of runs of 30 steps of a ship, on a server without the policy and on one with it, in turn."""
    times: tuple[list[float], list[float]] = [], []
    with policy_server(host, demo, None) as plain, policy_server(host, demo, policy) as guarded:
        for number in range(TIMES):
            draft = Draft(SHIP, 1)
            graph = draft.saved(draft.ksampler(steps=30, seed=number))
            for server, own in zip((plain, guarded), times, strict=True):
                own.append(seconds_of(server.api.run(graph)))
    return times


def measured(host: Host, demo: Path, policy: Path, images: int, only: str) -> dict[str, Any]:
    """Return all rows, and what the policy costs."""
    plain, guarded = overhead(host, demo, policy)
    with policy_server(host, demo, None) as server:
        chosen = [case for case in cases(server.api.get("/object_info"), images) if only in case.name]
        last = [case for case in put_back(images) if only in case.name]
        before = shown_by(server, chosen)
        queue_before = queued(server, images)
        last_before = shown_by(server, last)
    with policy_server(host, demo, policy) as server:
        after = shown_by(server, chosen)
        queue_after = queued(server, images)
        health = server.api.get("/unguide/policy")
        stopped = stopped_in_mid_run(server)
    again = Draft(CAT, images)
    restarted = Case("after a restart in mid-run", (again.saved(again.ksampler()),))
    with policy_server(host, demo, policy) as server:
        restarted_after = show(server, restarted)
        last_after = shown_by(server, last)
    lines = [json.loads(line) for line in policy.with_name("policy.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [
        *zip(chosen, before, after, strict=True),
        *((case, one, other) for (case, one), (_, other) in zip(queue_before, queue_after, strict=True)),
        (Case("stopped in mid-run", ()), Shown(), stopped),
        (restarted, before[0], restarted_after),
        *zip(last, last_before, last_after, strict=True),
    ]
    rows = [row(*pair, lines) for pair in pairs]
    return {"health": health, "overhead": costs(rows, plain, guarded), "rows": [_fields(one) for one in rows]}


def costs(rows: Sequence[Row], plain: Sequence[float], guarded: Sequence[float]) -> dict[str, float]:
    """Return the overhead on unrelated images: the worst ratio of NFE at 30 steps, and milliseconds besides NFE.

    Of each server's fastest run: what else the machine does only adds to a run.
    """
    ratios = [
        one.evaluations[1] / one.evaluations[0] for one in rows if one.name == "30 steps, ship" and one.evaluations
    ]
    extra = (ratios[0] - 1.0) * min(plain) if ratios else 0.0
    return {
        "nfe_ratio_30_steps": ratios[0] if ratios else 0.0,
        "plain_seconds": min(plain),
        "guarded_seconds": min(guarded),
        "milliseconds_besides_nfe": 1000.0 * (min(guarded) - min(plain) - extra),
    }


def _fields(one: Row) -> dict[str, Any]:
    return {name.rstrip("_"): value for name, value in asdict(one).items()}


# ------------------------------------------------------------------ soak


def soak(host: Host, demo: Path, policy: Path, images: int) -> dict[str, Any]:
    """Return the server's memory over many images, concept and ship in turn, and the lines of its log."""
    log = policy.with_name("policy.jsonl")
    log.write_text("")
    memory = []
    with policy_server(host, demo, policy) as server:
        for number in range(images):
            draft = Draft((CAT, SHIP)[number % 2], 1)
            server.api.run(draft.saved(draft.ksampler(steps=6, seed=number)))
            if number % 25 == 24:
                memory.append(resident(server))
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    actions = dict(Counter(line["action"] for line in lines))
    return {"images": images, "lines": len(lines), "actions": actions, "resident_mib": memory}


def resident(server: Server) -> float:
    """Return the resident memory of the server in MiB."""
    pid = server.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    status = Path(f"/proc/{child}/status").read_text()
    return round(int(status.split("VmRSS:")[1].split()[0]) / 1024.0, 1)


# ------------------------------------------------------------------ table


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows in Markdown."""
    lines = []
    for one in rows:
        spent = one["evaluations"]
        nfe = "" if spent is None else f"{spent[0]:g} -> {spent[1]:g}"
        lines.append((one["name"], one["without"], one["with"], nfe, one["status"]))
    return markdown(("graph", "without", "with", "NFE", "status"), lines)


def document(results: dict[str, Any]) -> str:
    """Return the results for a document: nodes of a kind counted, every other graph in the table."""
    kinds = ("sampler ", "patch ")
    rows, costs = results["rows"], results["overhead"]
    counts = Counter(one["status"] for one in rows)
    parts = [f"{len(rows)} graphs: {', '.join(f'{count} {word}' for word, count in counts.most_common())}."]
    parts.append(
        f"An unrelated image of 30 steps takes {costs['nfe_ratio_30_steps']:.3f}x the model evaluations, and "
        f"{costs['milliseconds_besides_nfe']:.0f} ms besides them."
    )
    for kind in kinds:
        found = Counter(one["status"] for one in rows if one["name"].startswith(kind))
        words = ", ".join(f"{count} {word}" for word, count in found.most_common())
        parts.append(f"Every {kind.strip()} node and name with its defaults, asked for the concept: {words}.")
    parts.append(table([one for one in rows if not one["name"].startswith(kinds)]))
    return "\n\n".join(parts)


def run(options: Namespace) -> None:
    """Send every graph to both servers, or generate for long under the policy, and print what came of it."""
    host = Host.from_environment()
    with tempfile.TemporaryDirectory() as folder:
        demo, policy = Path(folder, "models"), Path(folder, "policy", "policy.yaml")
        write_demo(host, demo)
        write_policy(demo, policy)
        if options.soak:
            results: dict[str, Any] = {"soak": soak(host, demo, policy, options.soak)}
        else:
            results = measured(host, demo, policy, options.images, options.only)
    keep(options.json, results)
    if options.soak:
        print(json.dumps(results, indent=1))
        return
    counts = Counter(one["status"] for one in results["rows"])
    print(f"{table(results['rows'])}\n\n{dict(counts)}\n")
    publish(document(results), options.markdown, "policy")
    sys.exit(any(one["status"] in BAD for one in results["rows"]))
