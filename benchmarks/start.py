"""From a command to the first update of a training: ``python -m benchmarks.start [--against COMMIT]``.

Starts ``dattrain train`` on Fashion-MNIST as a process again and again, with the code of this checkout and, in turns, with that of another
commit, and reads off its lines when it got where. Modules are counted in a run of their own.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from dattrain.bench.common import Spread, describe_machine
from dattrain.cli import demo_steps

PHASES = {
    "recipe read": "loading torch",
    "torch and timm imported": "run folder:",
    "DeepSpeed imported, model built": "updates 0 to",
    "first update": "step 1/",
}
"""What is done when a line with these words appears."""


def start(code: Path, shards: tuple[str, str], folder: Path, *options: str) -> tuple[list[float], int]:
    """Seconds from the start of a process until each phase was over, and how many modules ``-X importtime`` in ``options`` named till then."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, *options, "-m", "dattrain", "train", "demo/pretrain", "--run", str(run)]
    command += [f"data.train={shards[0]}", f"data.val={shards[1]}", "schedule.updates=1"]
    command += ["schedule.warmup_updates=0", "train.log_every=1"]
    found: list[float] = []
    modules = 0
    begin = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(code)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            waiting = len(found) < len(PHASES)
            modules += waiting and line.startswith("import time:")
            said.append(line)
            if waiting and list(PHASES.values())[len(found)] in line:
                found.append(time.perf_counter() - begin)
    if process.returncode or len(found) < len(PHASES):
        raise SystemExit("".join(said))
    return found, modules


def checkout(commit: str, folder: Path) -> Path:
    """The package as ``commit`` has it."""
    packed = subprocess.run(
        ["git", "archive", commit, "dattrain", "configs", "launch"], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="COMMIT", help="compare with this commit's code")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="starts of each (default: 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shards = demo_steps.pack(folder)
        codes = {"this": Path.cwd()}
        if args.against:
            codes = {args.against: checkout(args.against, folder / "against"), **codes}
        modules = {name: start(code, shards, folder, "-X", "importtime")[1] for name, code in codes.items()}
        turns: dict[str, list[list[float]]] = {name: [] for name in codes}
        for _ in range(args.rounds):
            for name, code in codes.items():
                turns[name].append(start(code, shards, folder)[0])
    print(", ".join(f"{k}: {v}" for k, v in describe_machine().items()))
    print("| code | modules | " + " | ".join(PHASES) + " | ratio (quartiles) |")
    print("|---" * (3 + len(PHASES)) + "|")
    first = next(iter(turns))
    for name, seconds in turns.items():
        columns = [Spread.from_values(column) for column in zip(*seconds)]
        ratio = Spread.from_values([a[-1] / b[-1] for a, b in zip(seconds, turns[first])])
        cells = [f"{s.median:.2f} s ({s.low:.2f}-{s.high:.2f})" for s in columns]
        print(f"| {name} | {modules[name]:,} | " + " | ".join(cells), end="")
        print(f" | {ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) |")


if __name__ == "__main__":
    main()
