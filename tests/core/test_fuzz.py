"""Hostile files end in an adapter or in an error, never in a crash, a hang, code that runs, or a gigabyte of memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz_formats.py")
SECONDS = 240


def test_thousands_of_mutated_files_end_in_an_adapter_or_an_error(tmp_path):
    """In a process of its own: the limits are the operating system's, and a crash is an exit status."""
    run = subprocess.run(
        [sys.executable, "-P", str(FUZZ), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(run.stdout.splitlines()[-1])
    print(f"\nfuzz: {report}", end="")
    assert report["mutations"] >= 2000
    assert report["loaded"] + report["refused"] == report["mutations"]
    # neither all of them nor none: the mutations are neither harmless nor mere noise
    assert report["loaded"] > 100
    assert report["refused"] > 1000
    assert report["reasons"] > 20


def test_the_limits_of_the_fuzz_run_are_real():
    """The same process setup refuses two gigabytes, and stops what does not end."""
    code = (
        f"import signal, sys, time; sys.path += [{str(FUZZ.parent)!r}, {str(FUZZ.parents[2])!r}]\n"
        "import torch, fuzz_formats as fuzz\n"
        "fuzz.limited()\n"
        "try: torch.ones(1 << 29)\n"
        "except RuntimeError: print('memory')\n"
        "signal.signal(signal.SIGALRM, fuzz.out_of_time); signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
        "try: time.sleep(60)\n"
        "except fuzz.OutOfTime: print('time')\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["memory", "time"], run.stderr
