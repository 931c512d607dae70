"""``dattrain demo``: the whole road on real images, in minutes on a laptop.

Pack Fashion-MNIST into shards, pre-train dat_atto at 64 x 64 on two local ranks, kill the run on purpose, resume it,
fine-tune at 96 x 96, evaluate both, and draw curves and sampling points. Every step is a command that it prints first.
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
from typing import TYPE_CHECKING

from dattrain.errors import UserError
from dattrain.runtime.owner import refuse_if_held

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
    for name, folder in (("dat_atto, 64 x 64", pretrain), ("fine-tuned, 96 x 96", finetune)):
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
        UserError: something else does, or one of its trainings goes on.
    """
    other = sorted(path.name for path in out.iterdir() if path.name not in MADE) if out.is_dir() else []
    if other:
        raise UserError(
            f"--out {out}: the demo clears its folder, and this one holds more than a demo made ({', '.join(other[:4])}"
            f"{', ...' if len(other) > 4 else ''}); choose one that is empty or not there"
        )
    for name in ("pretrain", "finetune"):
        refuse_if_held(out / name)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)


def read(spec: str) -> tuple[np.ndarray, np.ndarray]:
    """Images n x 28 x 28 and labels n, uint8, decoded from the demo's shards."""
    import numpy as np

    from dattrain.data.decode.images import decode
    from dattrain.data.source.dataset import open_dataset

    dataset = open_dataset(spec)
    where = [(shard, i) for shard, count in enumerate(dataset.counts) for i in range(count)]
    images = np.stack([decode(dataset.read(*place).data)[0].numpy() for place in where])
    labels = np.array([dataset.label(*place) for place in where], dtype=np.uint8)
    dataset.close()
    return images, labels


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
        "\n--- killed on purpose (SIGKILL); the same command again goes on where the last checkpoint is ---",
        flush=True,
    )


def published(run: Path) -> list[Path]:
    """Manifests of the checkpoints of a run."""
    return sorted((run / "checkpoints").glob("step_*/manifest.json"))


def picture(file: Path, pretrain: Path, finetune: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Loss and accuracy of both runs above one image per class with its deformed sampling points (the paper's Figure 4)."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    import torch
    from matplotlib import pyplot
    from torchvision.transforms.v2.functional import normalize, resize

    from dattrain.pretrained.weights import load_model
    from dattrain.visualize import draw
    from dattrain.visualize.sampling_points import capture

    figure = pyplot.figure(figsize=(12, 7.2), layout="constrained")
    curves, sheet = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.15)))
    loss, accuracy = curves.subplots(1, 2)
    seen = 0
    for name, folder in (("pre-training, 64 x 64", pretrain), ("fine-tuning, 96 x 96", finetune)):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for axis, key, style in ((loss, "loss", "-"), (accuracy, "top1", "o-")):
            points = [(seen + row["samples"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points), style, label=name)
        seen += max(row["samples"] for row in rows)
    loss.set(xlabel="images seen", ylabel="training loss")
    accuracy.set(xlabel="images seen", ylabel="top-1 on 2,000 test images, %")
    loss.legend()
    accuracy.legend(loc="lower right")

    model, cfg = load_model(finetune)
    chosen = images[[int(np.flatnonzero(labels == c)[0]) for c in range(len(CLASSES))]]
    pixels = resize(
        torch.from_numpy(chosen)[:, None].expand(-1, 3, -1, -1), list(cfg.img_size), antialias=True
    )
    inputs = normalize(pixels.float() / 255, list(cfg.mean), list(cfg.std))
    for axis, image, blocks, name in zip(sheet.subplots(2, 5).flat, pixels, capture(model, inputs), CLASSES):
        draw.points(axis, image.permute(1, 2, 0).numpy(), blocks[0], area=9)
        axis.set_title(name, fontsize=9)
    sheet.suptitle(
        "where the first deformable block samples its keys; one colour per offset group", fontsize=10
    )
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
