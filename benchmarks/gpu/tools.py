"""Stages ``sanitizer``, ``counters`` and ``tests``: NVIDIA's tools where they are on PATH, and the tests that need a GPU."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.gpu.job import Job, NotRun

ROOT = Path(__file__).resolve().parents[2]
COUNTERS = {
    "smsp__inst_executed.sum": "warp instructions",
    "gpu__time_duration.sum": "time",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy reached",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots used",
    "l1tex__data_pipe_lsu_wavefronts.sum": "L1 wavefronts",
    "lts__t_sectors_op_red.sum": "L2 sectors of reductions",
}
"""Metrics of Nsight Compute and what they are."""
SHAPES = {"14x14": (14, 12, 3, 32), "24x24": (24, 16, 4, 8)}
"""Side, heads, groups, batch of what is counted."""


def sanitizer(job: Job) -> None:
    """Memcheck over forward and backward of two small cases; every allocation of its own, so that overruns are seen."""
    tool = required("compute-sanitizer")
    command = [
        tool,
        "--tool",
        "memcheck",
        sys.executable,
        "-m",
        "benchmarks.gpu.call",
        "5",
        "2",
        "1",
        "2",
        job.device,
    ]
    done = subprocess.run(
        ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *command],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=ROOT,
    )
    print(done.stdout, done.stderr, flush=True)
    job.figure("memory errors", memory_errors(done.stdout + done.stderr))


def memory_errors(text: str) -> int:
    """What compute-sanitizer's last line says.

    Raises:
        RuntimeError: it says nothing, so the tool itself failed.
    """
    found = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    if not found:
        raise RuntimeError("compute-sanitizer gave no summary")
    return int(found[-1])


def counters(job: Job) -> None:
    """Counters of every kernel of one forward and backward, at 14 x 14 and at 24 x 24; instructions per score of all of them."""
    if job.dry:
        from benchmarks.gpu import call

        call.main(5, 2, 1, 1, job.device)  # what is watched, at least
    tool = required("ncu")
    for name, (side, heads, groups, batch) in SHAPES.items():
        shape = [str(x) for x in (side, heads, groups, batch)]
        command = [
            tool,
            "--csv",
            "--profile-from-start",
            "off",
            "--clock-control",
            "none",
            "--metrics",
            ",".join(COUNTERS),
        ]
        done = subprocess.run(
            [*command, sys.executable, "-m", "benchmarks.gpu.call", *shape, job.device],
            capture_output=True,
            text=True,
            errors="replace",
            cwd=ROOT,
        )
        (job.folder / f"{name}.csv").write_text(done.stdout, encoding="utf-8")
        kernels = parse(done.stdout)
        if not kernels:
            print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
            raise RuntimeError("ncu read no counters")
        for kernel, values in kernels.items():
            for metric, (value, unit) in values.items():
                job.figure(f"{name} {kernel}: {COUNTERS[metric]}", value, unit)
        scores = batch * heads * side**4
        job.figure(f"{name} forward+backward: instructions per score", instructions(kernels) / scores)


def parse(text: str) -> dict[str, dict[str, tuple[float, str]]]:
    """Kernel to metric to (value, unit), of ncu's ``--csv``; launches of one kernel are added up, but for percentages."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, tuple[float, str]]] = defaultdict(dict)
    for row in csv.DictReader(lines[start:]):
        metric = row.get("Metric Name")
        if metric not in COUNTERS:
            continue
        kernel, unit = row["Kernel Name"].split("(")[0][:60], row["Metric Unit"]
        value = float(row["Metric Value"].replace(",", ""))
        before = found[kernel].get(metric, (0.0, unit))[0]
        found[kernel][metric] = (max(before, value) if unit == "%" else before + value, unit)
    return dict(found)


def instructions(kernels: dict[str, dict[str, tuple[float, str]]]) -> float:
    """Instructions of threads: 32 times those of warps."""
    return 32 * sum(values.get("smsp__inst_executed.sum", (0.0, ""))[0] for values in kernels.values())


def tests(job: Job) -> None:
    """``pytest -m gpu`` in a few processes; in a dry run one file of it, whose test is skipped."""
    # Mostly compiling, each test its own kernels.
    some = min(len(os.sched_getaffinity(0)), 8)
    where = ["tests/unit/state/test_state_background.py"] if job.dry else ["-n", str(some)]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *where]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT)
    print(done.stdout, done.stderr, flush=True)
    counts = outcomes(done.stdout)
    if not counts:
        raise RuntimeError(f"pytest ended with exit code {done.returncode} and ran nothing")
    job.figure("tests that passed", counts.get("passed", 0))
    job.figure("tests that were skipped", counts.get("skipped", 0))
    job.figure(
        "tests that failed", counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    )


def outcomes(text: str) -> dict[str, int]:
    """Counts of pytest's last line by word."""
    for line in reversed(text.splitlines()):
        if re.search(r" in [\d.:]+", line):
            return {
                word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", line.split(" in ")[0])
            }
    return {}


def required(tool: str) -> str:
    """Where the tool is. Raises NotRun where it is not on PATH."""
    found = shutil.which(tool)
    if found is None:
        raise NotRun(f"{tool} is not on PATH")
    return found
