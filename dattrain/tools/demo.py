"""``dattrain demo``: the whole road on real images, in minutes on a laptop.

Pack Fashion-MNIST into shards, pre-train dat_atto at 64 x 64 on two local ranks, kill the run on purpose, resume it,
fine-tune at 96 x 96, evaluate both, and draw curves and sampling points. Every step is a command that it prints first.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.errors import UserError

if TYPE_CHECKING:
    import numpy as np

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "demo"


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
    """Run the demo; raises UserError where the recipes are not at hand or a step fails."""
    if not CONFIGS.is_dir():
        raise UserError(f"{CONFIGS}: no recipes there; the demo runs from a clone of the repository")
    out: Path = args.out
    started = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    data = [f"data.train={out}/shards/train", f"data.val={out}/shards/val"]
    pack(out)
    pretrain, finetune = out / "pretrain", out / "finetune"
    trained = time.perf_counter()
    command = train_command("pretrain", pretrain, args.nproc, [*data, *args.overrides])
    kill_half_way(command, pretrain)
    execute(command)
    execute(
        train_command("finetune", finetune, args.nproc, [*data, f"init.from={pretrain}", *args.overrides])
    )
    trained = time.perf_counter() - trained
    rows = [("1-nearest neighbour on pixels", nearest_neighbour(*split("train"), *split("val")))]
    for name, folder in (("dat_atto, 64 x 64", pretrain), ("fine-tuned, 96 x 96", finetune)):
        report = out / f"{folder.name}-eval.json"
        execute([*dattrain(), "eval", str(folder), "--json", str(report)])
        rows.append((name, json.loads(report.read_text())["top1"]))
    picture(out / "demo.png", pretrain, finetune)
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


def split(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images n x 28 x 28 and labels n, uint8: 8,000 to train on and 2,000 to test on, drawn with seed 0."""
    import numpy as np

    folder = resources.files("dattrain") / "demo"
    images = np.frombuffer(
        gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(
        gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
    )
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = order[:8000] if part == "train" else order[8000:]
    return images.reshape(-1, 28, 28)[chosen], labels[chosen]


def pack(out: Path) -> None:
    """Write both parts as arrays and pack them into shards with ``dattrain data pack``."""
    import numpy as np

    for part in ("train", "val"):
        images, labels = split(part)
        source = out / f"{part}.npz"
        np.savez(source, images=images, labels=labels)
        execute(
            [
                *dattrain(),
                "data",
                "pack",
                str(source),
                str(out / "shards" / part),
                "--samples-per-shard",
                "500",
            ]
        )


def nearest_neighbour(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Top-1 in percent of 1-nearest neighbour by Euclidean distance on pixels."""
    import numpy as np

    a = train.reshape(len(train), -1).astype(np.float32)
    b = test.reshape(len(test), -1).astype(np.float32)
    nearest = (np.square(a).sum(1) - 2 * b @ a.T).argmin(1)
    return float((train_labels[nearest] == test_labels).mean() * 100)


def dattrain() -> list[str]:
    """The command line of this very installation."""
    return [sys.executable, "-m", "dattrain"]


def train_command(recipe: str, run: Path, nproc: int, overrides: Sequence[str]) -> list[str]:
    """``dattrain train`` for a demo recipe."""
    config = os.path.relpath(CONFIGS / f"{recipe}.yaml")
    return [*dattrain(), "train", config, *overrides, "--run", str(run), "--nproc", str(nproc)]


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
        "\n--- killed on purpose (SIGKILL); the same command again goes on where the last checkpoint is ---",
        flush=True,
    )


def published(run: Path) -> list[Path]:
    """Manifests of the checkpoints of a run."""
    return sorted((run / "checkpoints").glob("step_*/manifest.json"))


def picture(file: Path, pretrain: Path, finetune: Path) -> None:
    """Loss and accuracy curves of both runs above test images with their deformed sampling points (the paper's Figure 4)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from dattrain.tools.viz import draw_points
    from dattrain.tools.weights import load_model

    figure, axes = pyplot.subplots(2, 6, figsize=(15, 5.4), layout="constrained")
    grid = axes[0, 0].get_gridspec()
    for axis in axes[0]:
        axis.remove()
    loss, accuracy = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    offset = 0
    for name, folder in (("pre-training, 64 x 64", pretrain), ("fine-tuning, 96 x 96", finetune)):
        rows = read_metrics(folder)
        steps = [row for row in rows if "loss" in row]
        evals = [row for row in rows if "top1" in row]
        loss.plot([offset + row["samples"] for row in steps], [row["loss"] for row in steps], label=name)
        accuracy.plot(
            [offset + row["samples"] for row in evals], [row["top1"] for row in evals], "o-", label=name
        )
        offset += rows[-1]["samples"]
    loss.set(xlabel="images seen", ylabel="training loss")
    accuracy.set(xlabel="images seen", ylabel="top-1, %")
    loss.legend()
    accuracy.legend(loc="lower right")
    model, meta = load_model(finetune)
    images, labels = split("val")
    for axis, index in zip(axes[1], range(6)):
        draw_points(model, images[index], meta=meta, axis=axis)
        axis.set_title(CLASSES[labels[index]], fontsize=9)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
