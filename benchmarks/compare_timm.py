"""Our trainer against an independent loop of torch and timm that shares nothing with it but the network.

The loop reads the same shards with ``tarfile`` and Pillow and takes everything else from torch and timm: DataLoader, crop,
RandAugment, random erasing, mixup and cutmix, soft cross-entropy, AdamW, the cosine schedule. Ours is ``dattrain train``. Both
begin with the same weights for a seed, have the same settings, and are scored by the loop's own evaluation on the 2,000 test
images, so that a fault in one of our pieces shows as a difference between the two. They see other random numbers, so it takes
many seeds; therefore both are also given the same batches, after which they should be equal but for rounding.

RandAugment has magnitude 6: at 9 timm's Posterize comes to 0 bits, which Pillow 13 refuses. Each finished run is added to
the results file, and is not done again.

    python -m benchmarks.compare_timm --seeds 3 --epochs 1 --out compare_timm.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dattrain.config.load import loads
from dattrain.data.augment.mixup import MixupCutmix
from dattrain.data.factory import train_loader
from dattrain.data.philox import Stream, uniform32
from dattrain.models import create

SIZE, CLASSES, BATCH, WARMUP = 32, 10, 64, 0.2
LR, MIN_LR, WARMUP_LR, WEIGHT_DECAY, CLIP, DROP_PATH = 1e-3, 1e-5, 1e-5, 0.05, 5.0, 0.05
MEAN, STD, SCALE = (0.286,) * 3, (0.353,) * 3, (0.35, 1.0)
OURS = {"ours, mix_group 2": 2, "ours, mix_group 64": BATCH}
LOOP = {"loop, timm's pair": "pair", "loop, timm's batch": "batch"}
PAIRED = (("ours, mix_group 2", "loop, timm's pair"), ("ours, mix_group 64", "loop, timm's batch"))


def recipe(shards: Path, seed: int, group: int, epochs: int) -> str:
    """The settings below ``loop``, as our recipe."""
    return f"""
name: compare
model: {{name: dat_atto, img_size: {SIZE}, num_classes: {CLASSES}, drop_path: {DROP_PATH}}}
data: {{train: "{shards}/train-*.tar", lanes: 16, workers: 0}}
augment:
  crop_scale: {list(SCALE)}
  randaugment: rand-m6-mstd0.5-inc1
  erase_prob: 0.25
  mixup: 0.8
  cutmix: 1.0
  mix_group: {group}
  label_smoothing: 0.1
  mean: {list(MEAN)}
  std: {list(STD)}
optim: {{lr: {LR}, lr_batch: {BATCH}, weight_decay: {WEIGHT_DECAY}, clip: {CLIP}}}
schedule: {{epochs: {epochs}, warmup_epochs: {WARMUP * epochs}, min_lr: {MIN_LR}, warmup_lr: {WARMUP_LR}}}
train: {{global_batch: {BATCH}, micro_batch: {BATCH}, precision: fp32, threads: 1, seed: {seed}}}
checkpoint: {{every_epochs: 1000, keep_last: 1, keep_best: 0}}
zero: {{stage: 1}}
"""


def ours(shards: Path, seed: int, group: int, epochs: int) -> nn.Module:
    """Train by the command, export, and load the weights into a fresh network."""
    return _train(recipe(shards, seed, group, epochs), seed)[0]


def _train(text: str, seed: int, *overrides: str) -> tuple[nn.Module, list[float]]:
    """The trained network, and the loss of each update."""
    with tempfile.TemporaryDirectory() as folder:
        config, run, out = Path(folder, "recipe.yaml"), Path(folder, "run"), Path(folder, "out.safetensors")
        config.write_text(text)
        _dattrain("train", str(config), *overrides, "--run", str(run))
        _dattrain("export", str(run), "--to", "safetensors", "--out", str(out))
        model = network(seed)
        model.load_state_dict(load_file(out))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return model, [row["loss"] for row in rows if "loss" in row]


def _dattrain(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dattrain", *words], check=True, stdout=subprocess.DEVNULL)


def loop(shards: Path, seed: int, mode: str, epochs: int) -> nn.Module:
    """Train as timm's ``train.py`` does, without a piece of ours but the network."""
    model = network(seed)
    random.seed(seed)
    np.random.seed(seed)
    data = DataLoader(
        Shards(
            sorted(shards.glob("train-*.tar")),
            timm.data.create_transform(
                SIZE, is_training=True, scale=SCALE, auto_augment="rand-m6-mstd0.5-inc1", interpolation="bicubic",
                re_prob=0.25, re_mode="pixel", mean=MEAN, std=STD,
            ),
        ),
        BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    mixup = timm.data.Mixup(
        0.8, 1.0, prob=1.0, switch_prob=0.5, mode=mode, label_smoothing=0.1, num_classes=CLASSES
    )
    batches = ((*mixup(images, labels), {}) for _ in range(epochs) for images, labels in data)
    fit(model, batches, epochs * len(data))
    return model


def fit(model: nn.Module, batches: Iterable[tuple[Any, Any, dict[str, Any]]], updates: int) -> list[float]:
    """The loop over (images, targets, further arguments of the network), on a schedule of ``updates``; the loss of each."""
    criterion = timm.loss.SoftTargetCrossEntropy()
    groups = timm.optim.param_groups_weight_decay(model, WEIGHT_DECAY, model.no_weight_decay())  # type: ignore[operator]
    optimizer = torch.optim.AdamW(groups, LR)
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer,
        updates,
        MIN_LR,
        warmup_t=round(WARMUP * updates),
        warmup_lr_init=WARMUP_LR,
        t_in_epochs=False,
    )
    losses: list[float] = []
    schedule.step_update(0)
    model.train()
    for images, targets, arguments in batches:
        loss = criterion(model(images, **arguments), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
        schedule.step_update(len(losses))
    return losses


def same_batches(shards: Path, updates: int) -> dict[str, float]:
    """Both on the batches that our loader and mixer make, with our drop path noise: what is left is what trains.

    Returns the largest difference of a loss, and the distance of the weights after ``updates`` as a share of the way that they went.
    """
    config = loads(recipe(shards, 0, 2, 1)).config
    trained, losses = _train(recipe(shards, 0, 2, 1), 0, f"train.max_steps={updates}")
    model, mixer = network(0), MixupCutmix(config.augment, CLASSES)
    begin = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    loader = train_loader(config, rank=0, world=1, samples_seen=0, device=torch.device("cpu"), img_size=SIZE)

    def batches() -> Iterable[tuple[Any, Any, dict[str, Any]]]:
        for batch in islice(loader, updates):
            images, targets, _ = mixer(batch)
            noise = uniform32(0, Stream.DROP_PATH, batch.position.numpy(), model.num_drop_path)  # type: ignore[arg-type]
            yield images, targets, {"drop_path_noise": torch.from_numpy(noise)}

    found = fit(model, batches(), loader.samples_per_epoch // BATCH)
    loader.close()
    mine, theirs = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (trained, model))
    return {
        "updates": updates,
        "loss_difference": max(abs(a - b) for a, b in zip(losses, found, strict=True)),
        "weights_apart": float((mine - theirs).norm() / (theirs - begin).norm()),
    }


def network(seed: int) -> nn.Module:
    """The network with the weights that both begin with."""
    torch.manual_seed(seed)
    return create("dat_atto", num_classes=CLASSES, img_size=SIZE, drop_path_rate=DROP_PATH)


class Shards(Dataset[Any]):
    """Images and labels of WebDataset tars, in memory, read without our code."""

    def __init__(self, tars: Sequence[Path], transform: Any) -> None:
        self.transform = transform
        members: dict[str, dict[str, bytes]] = {}
        for path in tars:
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, kind = member.name.partition(".")
                    file = tar.extractfile(member)
                    assert file is not None
                    members.setdefault(key, {})[kind] = file.read()
        self.samples = [
            (next(data for kind, data in files.items() if kind not in ("cls", "json")), int(files["cls"]))
            for files in members.values()
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        data, label = self.samples[index]
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB")), label


@torch.no_grad()
def score(model: nn.Module, shards: Path) -> dict[str, float]:
    """Top-1 in percent and cross-entropy on the test images, by timm's transform."""
    transform = timm.data.create_transform(SIZE, interpolation="bicubic", crop_pct=1.0, mean=MEAN, std=STD)
    model.eval()
    right = loss = count = 0.0
    for images, labels in DataLoader(Shards(sorted(shards.glob("val-*.tar")), transform), 250):
        logits = model(images)
        right += float((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return {"top1": 100 * right / count, "cross_entropy": loss / count}


def pack(folder: Path) -> Path:
    """The demo's 10,000 images as shards: 8,000 and 2,000."""
    source = resources.files("dattrain") / "demo" / "t10k-images-idx3-ubyte.gz"
    with resources.as_file(source) as images:
        _dattrain(
            "data", "pack", str(images), str(folder), "--holdout", "2000", "--per-shard", "500", "--jobs", "1"
        )
    return folder


def table(runs: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: mean and deviation over seeds; then ours less the loop's, seed by seed, with the standard error of the mean."""
    lines = ["| | seeds | top-1, % | cross-entropy |", "|---|---|---|---|"]
    for name, by_seed in runs.items():
        if not (rows := list(by_seed.values())):
            continue
        lines.append(
            f"| {name} | {len(rows)} | {_spread([r['top1'] for r in rows], '.2f')} "
            f"| {_spread([r['cross_entropy'] for r in rows], '.4f')} |"
        )
    lines += ["", "| ours less the loop's | seeds | top-1, points | cross-entropy |", "|---|---|---|---|"]
    for mine, other in PAIRED:
        seeds = [seed for seed in runs.get(mine, {}) if seed in runs.get(other, {})]
        if len(seeds) < 2:
            continue
        cells = []
        for key, form in (("top1", "+.2f"), ("cross_entropy", "+.4f")):
            gaps = [runs[mine][seed][key] - runs[other][seed][key] for seed in seeds]
            cells.append(f"{mean(gaps):{form}} ± {stdev(gaps) / len(gaps) ** 0.5:{form[1:]}}")
        lines.append(f"| {mine} - {other.removeprefix('loop, ')} | {len(seeds)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def main() -> None:
    """Do the runs that the results file lacks, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("compare_timm.json"))
    parser.add_argument("--only", metavar="WORD", default="", help="contenders whose name holds this word")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    done: dict[str, Any] = {"epochs": args.epochs, "runs": {name: {} for name in (*OURS, *LOOP)}}
    if args.out.exists():
        done = json.loads(args.out.read_text())
    if done["epochs"] != args.epochs:
        parser.error(f"{args.out} holds runs of {done['epochs']} epochs, not {args.epochs}")
    with tempfile.TemporaryDirectory() as folder:
        shards = pack(Path(folder, "shards"))
        if "same_batches" not in done:
            done["same_batches"] = same_batches(shards, 40)
            print(f"the same batches for both: {done['same_batches']}", flush=True)
            args.out.write_text(json.dumps(done, indent=2) + "\n")
        for seed in range(args.seeds):
            for name in (*OURS, *LOOP):
                if str(seed) in done["runs"][name] or args.only not in name:
                    continue
                started = time.perf_counter()
                if name in OURS:
                    model = ours(shards, seed, OURS[name], args.epochs)
                else:
                    model = loop(shards, seed, LOOP[name], args.epochs)
                row = {**score(model, shards), "seconds": round(time.perf_counter() - started, 1)}
                done["runs"][name][str(seed)] = row
                print(f"{name}, seed {seed}: {row}", flush=True)
                args.out.write_text(json.dumps(done, indent=2) + "\n")
    print(f"\nthe same batches for both: {done['same_batches']}\n\n{table(done['runs'])}")


if __name__ == "__main__":
    main()
