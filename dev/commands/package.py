"""`python3 dev package`: builds the zip that the registry would get, shows what is in it, and checks it."""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from dev import package, prepare
from dev.host import Host
from dev.report import Progress

TO_IMAGE = "zip to first erased image, without the server's start"
SUMMARY = "build the zip for the registry, and check what is in it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="the folder for the zip")
    parser.add_argument("--time", action="store_true", help="also time it: from the zip to the first erased image")
    parser.add_argument("--json", action="store_true", help="print files, sizes and failures as JSON")


def run(arguments: argparse.Namespace, extra: list[str], progress: Progress) -> int:
    host = prepare.prepare(arguments, progress)
    archive = package.build(arguments.out.absolute(), progress)
    with tempfile.TemporaryDirectory() as scratch:
        wrong = package.check(archive, package.unpack(archive, Path(scratch, "pack")), host.python, progress)
        seconds = timed(archive, Path(scratch, "base"), host, progress) if arguments.time else {}
    if (taken := seconds.get(TO_IMAGE, 0)) > package.LIMIT_SECONDS:
        wrong.append(f"{TO_IMAGE} took {taken:.0f} s; expected {package.LIMIT_SECONDS} at most")
    files, packed = package.sizes(archive), archive.stat().st_size
    if arguments.json:
        print(
            json.dumps(
                {"zip": str(archive), "bytes": packed, "files": files, "wrong": wrong, "seconds": seconds}, indent=1
            )
        )
    else:
        print("\n".join(f"{size:>10,}  {name}" for name, size in sorted(files.items())))
        demo = sum(size for name, size in files.items() if name.startswith(package.DEMO_WEIGHTS))
        print(f"{len(files)} files, {sum(files.values()):,} bytes, of which {demo:,} are the demo's weights")
        print(f"{archive}: {packed:,} bytes")
        print("".join(f"{name}: {value:.1f} s\n" for name, value in seconds.items()), end="")
        print("\n".join(f"wrong: {what}" for what in wrong) or "all checks passed")
    return 1 if wrong else 0


def timed(archive: Path, base: Path, host: Host, progress: Progress) -> dict[str, float]:
    """Seconds to unpack the zip into a bare ComfyUI, to start that, and to run the quick start to its image.

    `TO_IMAGE` is the first and the last of these. `processor` is what starting and running took of the processor, which
    a busy machine does not stretch.
    """
    progress("timing the zip in a bare ComfyUI")
    started = time.perf_counter()
    bare = package.install(archive, base, host)
    unpacked, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = {"unpack": unpacked - started, **package.first_image(bare)}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**seconds, TO_IMAGE: seconds["unpack"] + seconds["run"], "processor": spent}
