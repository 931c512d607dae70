"""The steps of the demos: every one is a command that is printed first, as a person would type it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from dattrain.errors import UserError
from dattrain.runtime.owner import refuse_if_in_use


def pack(out: Path) -> tuple[str, str]:
    """Pack the demo's images into ``out/shards``; returns the patterns of 8,000 for training and of 2,000 held out."""
    source = os.path.relpath(Path(__file__).parents[1] / "demo" / "t10k-images-idx3-ubyte.gz")
    execute([*dattrain(), "data", "pack", source, f"{out}/shards", "--holdout", "2000", "--per-shard", "500"])
    return f"{out}/shards/train-*.tar", f"{out}/shards/val-*.tar"


def classification(
    out: Path, nproc: int, train: str, val: str, overrides: Sequence[str]
) -> tuple[Path, Path]:
    """Pre-train into ``out/pretrain``, killed and resumed, and fine-tune into ``out/finetune``; returns both."""
    data = [f"data.train={train}", f"data.val={val}"]
    pretrain, finetune = out / "pretrain", out / "finetune"
    command = train_command("pretrain", pretrain, nproc, [*data, *overrides])
    kill_half_way(command, pretrain)
    execute(command)
    execute(train_command("finetune", finetune, nproc, [*data, f"init.from={pretrain}", *overrides]))
    return pretrain, finetune


def clear(out: Path, made: Collection[str], runs: Sequence[str]) -> None:
    """Make ``out`` an empty folder, where nothing lies there but what a demo made.

    Args:
        made: names that a demo makes.
        runs: those of them that are run folders.

    Raises:
        UserError: something else does, or one of its trainings runs.
    """
    other = sorted(path.name for path in out.iterdir() if path.name not in made) if out.is_dir() else []
    if other:
        raise UserError(
            f"--out {out}: the demo clears its folder, and this one holds more than a demo made ({', '.join(other[:4])}"
            f"{', ...' if len(other) > 4 else ''}); choose one that is empty or not there"
        )
    for name in runs:
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
