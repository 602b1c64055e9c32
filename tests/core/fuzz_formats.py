"""Hostile files: mutations of every format, in a process of its own with a limit on its memory and on each one's time.

    python tests/core/fuzz_formats.py FOLDER [MUTATIONS [SEED]]        prints the counts as JSON

Every mutation must end in a valid adapter or in an AdapterError. Anything else, another exception, a crash, a hang,
more memory than the limit or a folder that somebody's code has made, ends this process with a traceback or a signal.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from unguide_core.adapter import Adapter, Card, LowRank
from unguide_core.adapter.containers import safetensors_bytes
from unguide_core.formats import FORMATS, AdapterError, load_adapter, save_adapter

MUTATIONS, SEED = 2400, 2508
SECONDS = 5.0
MEMORY = 1 << 30
STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
Files = dict[str, bytes]


def originals(folder: Path) -> dict[str, Files]:
    """A small adapter in every format, as file contents by name."""
    generator = torch.Generator().manual_seed(1)
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_"
    layers = {
        path + name: LowRank(torch.randn(2, 3, generator=generator), torch.randn(4, 2, generator=generator), 8.0)
        for name in "kv"
    }
    adapter = Adapter(layers, Card(concept="cat", synonyms=("kitty",), settings={"rate": 0.1}))
    found: dict[str, Files] = {}
    for name, format in FORMATS.items():
        target = folder / f"original{format.suffix}"
        save_adapter(adapter, target, name)
        paths = [target] if target.is_file() else sorted(target.iterdir())
        found[name] = {p.name: p.read_bytes() for p in paths}
        target.unlink() if target.is_file() else None
    sliders = io.BytesIO()
    torch.save({f"{STEM}.lora_down.weight": torch.ones(2, 3), f"{STEM}.lora_up.weight": torch.ones(4, 2)}, sliders)
    found["sliders"] = {"sliders.pt": sliders.getvalue()}
    full = {f"{path.removeprefix('unet.')}k.weight": torch.randn(4, 3, generator=generator)}

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    other = STEM.replace("to_k", "to_v")
    products = {f"{STEM}.hada_w{i}_a": randn(4, 1) for i in (1, 2)} | {
        f"{STEM}.hada_w{i}_b": randn(1, 3) for i in (1, 2)
    }
    products |= {f"{other}.lokr_w1": randn(2, 1), f"{other}.lokr_w2": randn(2, 3), f"{STEM}.alpha": torch.ones(())}
    turned = {f"{STEM}.oft_blocks": randn(2, 2, 2), f"{other}.dora_scale": randn(4, 1).abs()}
    turned |= {f"{other}.lora_down.weight": randn(1, 3), f"{other}.lora_up.weight": randn(4, 1)}
    found["products"] = {"products.safetensors": safetensors_bytes(products, {})}
    found["turned"] = {"turned.safetensors": safetensors_bytes(turned, {})}
    found["full"] = {"esd.safetensors": safetensors_bytes(full, {})}
    return found


# mutations: bytes to bytes, drawn by hypothesis


def flipped(data: Any, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(changed)


def truncated(data: Any, content: bytes) -> bytes:
    return content[: data.draw(st.integers(0, len(content) - 1))]


def spliced(data: Any, content: bytes) -> bytes:
    start = data.draw(st.integers(0, len(content)))
    return content[:start] + data.draw(st.binary(max_size=64)) + content[data.draw(st.integers(0, len(content))) :]


def filled(data: Any, content: bytes) -> bytes:
    """NaN, infinities, largest numbers where tensors lie."""
    pattern = data.draw(st.sampled_from([b"\xff\xff\xff\x7f", b"\x00\x00\x80\x7f", b"\xff" * 4, b"\x00" * 4]))
    start = data.draw(st.integers(0, max(0, len(content) - 32)))
    return content[:start] + pattern * 4 + content[start + 16 :]


def oversized(data: Any, content: bytes) -> bytes:
    """Another length of the header than it has."""
    length = data.draw(st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**31, 2**63, len(content)])))
    return struct.pack("<Q", length) + content[8:]


LARGE = [10**6, 2**31, 2**32, 2**62, 2**63, 10**30, 10**400, 1e308, float("nan")]
NUMBERS = st.one_of(st.integers(-1, 9), st.sampled_from(LARGE), st.sampled_from([-1.5, None, "8", [], {}, True]))
DTYPES = ["F16", "F64", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "C64", "F4", "F6_E2M3"]
TRICKS = ["../../evil", "/etc/passwd", "\x00", "(a+)+$", "dora_scale", "x.alpha", "", "{}", "[", "NaN"]
TEXTS = st.one_of(
    st.sampled_from([*TRICKS, f"{STEM}.lora_mid.weight"]),
    st.text(max_size=8),
    st.builds(lambda depth: "[" * depth, st.sampled_from([100, 100_000])),
)


def rewritten(data: Any, value: Any) -> Any:
    """A JSON value with one part of it, anywhere, replaced, renamed or removed."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        action = data.draw(st.sampled_from(["go down", "go down", "rename", "remove", "double"]))
        changed = dict(value)
        if action == "go down":
            changed[key] = rewritten(data, value[key])
        elif action == "double":
            changed[data.draw(TEXTS)] = value[key]
        else:
            kept = changed.pop(key)
            if action == "rename":
                changed[data.draw(TEXTS)] = kept
        return changed
    if isinstance(value, list) and value and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], rewritten(data, value[place]), *value[place + 1 :]]
    return data.draw(st.one_of(NUMBERS, TEXTS, st.sampled_from(DTYPES)))


def reheaded(data: Any, content: bytes) -> bytes:
    """Shapes, offsets (overlapping ones too), types, names and metadata in a safetensors header."""
    if content[8:9] != b"{":
        return flipped(data, content)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        header = rewritten(data, header) if isinstance(header, dict) else header
    text = json.dumps(header).encode("utf-8", "replace")
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


class Code:
    """A pickle that would make a file, if it were run."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("i_ran",)


def rezipped(data: Any, content: bytes) -> bytes:
    """A torch zip with other members: compressed, doubled, bombs, tricky names, pickles with code or damage."""
    if content[:2] != b"PK":
        return reheaded(data, content)
    members = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = data.draw(st.sampled_from(sorted(members)))
    action = data.draw(st.sampled_from(["code", "flip", "bomb", "rename", "drop", "repeat", "metadata", "bare"]))
    root = name.split("/")[0]
    if action == "bare":
        return pickle.dumps({STEM: Code()})
    if action == "code":
        members[next(n for n in members if n.endswith("data.pkl"))] = pickle.dumps({"a": Code()})
    elif action == "flip" and members[name]:
        members[name] = flipped(data, members[name])
    elif action == "bomb":
        members[name] = bytes(1 << 22)
    elif action == "rename":
        members[data.draw(TEXTS) or "x"] = members.pop(name)
    elif action == "drop":
        members.pop(name)
    elif action == "repeat":
        members[name] = members[name] * data.draw(st.integers(2, 50))
    else:
        members[f"{root}/unguide.json"] = data.draw(TEXTS).encode("utf-8", "replace")
    made = io.BytesIO()
    method = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(made, "w", method) as archive:
        for member, value in members.items():
            archive.writestr(member.replace("\x00", "0")[:200] or "x", value)
    return made.getvalue()


def reconfigured(data: Any, content: bytes) -> bytes:
    """A PEFT configuration with other values."""
    if content[:1] != b"{":
        return reheaded(data, content)
    return json.dumps(rewritten(data, json.loads(content))).encode("utf-8", "replace")


ABSURD = [
    ("a rank of a million", {f"{STEM}.lora_down.weight": (10**6, 1), f"{STEM}.lora_up.weight": (1, 10**6)}),
    ("a rank of ten thousand", {f"{STEM}.lora_down.weight": (10**4, 2), f"{STEM}.lora_up.weight": (2, 10**4)}),
    ("a product of a million by a million", {f"{STEM}.lokr_w1": (1000, 1000), f"{STEM}.lokr_w2": (1000, 1000)}),
    (
        "a core of a million places",
        {
            f"{STEM}.lora_down.weight": (1, 10**5),
            f"{STEM}.lora_up.weight": (4, 1),
            f"{STEM}.lora_mid.weight": (1, 1, 10**6),
        },
    ),
    (
        "a decomposed product of a million by a million",
        {
            f"{STEM}.lora_down.weight": (1, 10**6),
            f"{STEM}.lora_up.weight": (10**6, 1),
            f"{STEM}.dora_scale": (10**6, 1),
        },
    ),
    ("a rotation of three thousand", {f"{STEM}.oft_blocks": (1, 3000, 3000)}),
    ("nothing in it", {f"{STEM}.lora_down.weight": (0, 4), f"{STEM}.lora_up.weight": (4, 0)}),
    ("seven dimensions", {f"{STEM}.lora_down.weight": (1,) * 7, f"{STEM}.lora_up.weight": (1,) * 7}),
]


def absurd(data: Any, content: bytes) -> bytes:
    _, shapes = data.draw(st.sampled_from(ABSURD))
    return safetensors_bytes({key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}, {})


MUTATORS: list[Callable[[Any, bytes], bytes]] = [
    *(flipped, truncated, spliced, filled, oversized, reheaded, reheaded, rezipped, rezipped, reconfigured, absurd)
]


def limited() -> int:
    """Lets this process grow by `MEMORY` at most from here on; returns the limit."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    return MEMORY


class OutOfTime(BaseException):
    """Not an Exception: what is read may catch those."""


def out_of_time(*_: object) -> None:
    raise OutOfTime(f"a mutation took more than {SECONDS} seconds")


def base(name: str) -> torch.Tensor:
    """The base model's weights, for files with full ones."""
    return torch.ones(4, 3)


def main(folder: Path, mutations: int = MUTATIONS, first: int = SEED) -> int:
    torch.set_num_threads(1)
    files = originals(folder)
    kinds = sorted(files)
    counts = {"mutations": 0, "loaded": 0, "refused": 0}
    reasons: dict[str, int] = {}
    signal.signal(signal.SIGALRM, out_of_time)
    os.chdir(folder)
    for kind in kinds:  # what is imported late is no mutation's memory
        read(folder, files[kind])
    memory = limited()

    @seed(first)
    @settings(
        max_examples=mutations,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def mutate(data: Any) -> None:
        kind = data.draw(st.sampled_from(kinds))
        changed = dict(files[kind])
        name = data.draw(st.sampled_from(sorted(changed)))
        mutator = data.draw(st.sampled_from(MUTATORS))
        changed[name] = mutator(data, changed[name])
        said = ""
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read(folder, changed)
        except AdapterError as error:
            said = str(error).partition(": ")[2]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert "alloc" not in said, f"only the limit on memory stopped it: {said}"
        counts["refused" if said else "loaded"] += 1
        if said:
            reasons[said[:24]] = reasons.get(said[:24], 0) + 1
        counts["mutations"] += 1
        assert not (folder / "i_ran").exists(), "somebody's code has run"

    mutate()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    report = {**counts, "reasons": len(reasons), "limit_mib": memory >> 20, "peak_mib": peak, "seconds_each": SECONDS}
    print(json.dumps(report))
    return 0


def read(folder: Path, files: Files) -> Adapter:
    """The adapter in files as they would lie on the disk."""
    target = folder / "mutated"
    target.mkdir(exist_ok=True)
    for old in target.iterdir():
        old.unlink()
    for name, content in files.items():
        (target / name).write_bytes(content)
    return load_adapter(target if len(files) > 1 else target / next(iter(files)), base=base, partial=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
