"""``dattrain demo``: from raw images to a fine-tuned network, in minutes on a laptop.

Pack Fashion-MNIST into shards, pre-train dat_atto at 32 x 32 on two local ranks, kill the run on purpose, resume it,
fine-tune at 64 x 64, evaluate both, and draw curves and sampling points. Every step is a command that it prints first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dattrain.errors import UserError
from dattrain.runtime.owner import refuse_if_in_use

MADE = frozenset({"shards", "pretrain", "finetune", "pretrain-eval.json", "finetune-eval.json", "demo.png"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for everything made (default: demo-out)"
    )
    parser.add_argument("--nproc", type=int, default=2, help="local ranks (default: 2)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for both trainings, e.g. schedule.epochs=1"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; raises UserError where a step fails."""
    from dattrain.demo.results import nearest_neighbour, picture, read

    out: Path = args.out
    started = time.perf_counter()
    clear(out)
    train, val = f"{out}/shards/train-*.tar", f"{out}/shards/val-*.tar"
    data = [f"data.train={train}", f"data.val={val}"]
    source = os.path.relpath(Path(__file__).parents[1] / "demo" / "t10k-images-idx3-ubyte.gz")
    execute([*dattrain(), "data", "pack", source, f"{out}/shards", "--holdout", "2000", "--per-shard", "500"])
    pretrain, finetune = out / "pretrain", out / "finetune"
    trained = time.perf_counter()
    command = train_command("pretrain", pretrain, args.nproc, [*data, *args.overrides])
    kill_half_way(command, pretrain)
    execute(command)
    execute(
        train_command("finetune", finetune, args.nproc, [*data, f"init.from={pretrain}", *args.overrides])
    )
    trained = time.perf_counter() - trained
    rows = [("1-nearest neighbour on pixels", nearest_neighbour(*read(train), *read(val)))]
    for name, folder in (("dat_atto, 32 x 32", pretrain), ("fine-tuned, 64 x 64", finetune)):
        report = out / f"{folder.name}-eval.json"
        execute([*dattrain(), "eval", str(folder), "--json", str(report)])
        rows.append((name, json.loads(report.read_text())["top1"]))
    picture(out / "demo.png", pretrain, finetune, *read(val))
    print(f"\n{'':34}top-1 on 2,000 test images")
    for name, top1 in rows:
        print(f"{name:34}{top1:6.2f} %")
    print(f"\ncurves and sampling points: {out / 'demo.png'}")
    print(f"training {trained:.0f} s, everything {time.perf_counter() - started:.0f} s")
    if max(top1 for _, top1 in rows[1:]) <= rows[0][1] and not args.overrides:
        raise UserError(
            "the network did not beat 1-nearest neighbour: something is wrong on this machine; please report it"
        )
    return 0


def clear(out: Path) -> None:
    """Make ``out`` an empty folder, where nothing lies there but what a demo made.

    Raises:
        UserError: something else does, or one of its trainings runs.
    """
    other = sorted(path.name for path in out.iterdir() if path.name not in MADE) if out.is_dir() else []
    if other:
        raise UserError(
            f"--out {out}: the demo clears its folder, and this one holds more than a demo made ({', '.join(other[:4])}"
            f"{', ...' if len(other) > 4 else ''}); choose one that is empty or not there"
        )
    for name in ("pretrain", "finetune"):
        refuse_if_in_use(out / name)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)


def dattrain() -> list[str]:
    """The command line of this very installation."""
    return [sys.executable, "-m", "dattrain"]


def train_command(recipe: str, run: Path, nproc: int, overrides: Sequence[str]) -> list[str]:
    """``dattrain train`` for a demo recipe."""
    # With its ending it is the shipped recipe, whatever folder of a demo lies here.
    return [*dattrain(), "train", f"demo/{recipe}.yaml", *overrides, "--run", str(run), "--nproc", str(nproc)]


def announce(command: Sequence[str]) -> None:
    """Print a command as a person would type it."""
    print(f"\n$ dattrain {shlex.join(command[3:])}", flush=True)


def execute(command: Sequence[str]) -> None:
    """Print and run a command; raises UserError where it fails."""
    announce(command)
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"that command ended with exit code {code}")


def kill_half_way(command: Sequence[str], run: Path) -> None:
    """Start a training and SIGKILL it, launcher and ranks, soon after its first checkpoint was published."""
    announce(command)
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while process.poll() is None and not published(run):
            time.sleep(0.2)
        time.sleep(1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    print(
        "\n--- killed on purpose (SIGKILL); the same command again resumes at its last checkpoint ---",
        flush=True,
    )


def published(run: Path) -> list[Path]:
    """Manifests of the checkpoints of a run."""
    return sorted((run / "checkpoints").glob("step_*/manifest.json"))
