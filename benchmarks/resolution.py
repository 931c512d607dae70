"""What a change of resolution costs without training, and what the position tables have to do with it.

Trains dat_atto at 64 x 64 by the demo's recipe (``dattrain train``), lays it out for other sizes, and evaluates it with its tables
resized, sampled, left as a new model draws them, and drawn with the trained tables' own deviation. All figures of a size
come from the same 2,000 images, so differences are paired. Finished trainings and sizes are kept in the work folder and the
results file: interrupt and go on as you like.

    python -m benchmarks.resolution --epochs 16 --threads 1 --out docs/benchmarks/resolution.json
    python -m benchmarks.resolution --run runs/mine --sizes 160 192     # a run of yours, nothing trained, nothing written
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.data.sources import read_idx
from dattrain.models import create, surgery
from dattrain.models.dat import DAT
from dattrain.tools import passes, pictures, weights
from dattrain.tools.weights import Card

ROOT = Path(__file__).parents[1]
TUNED = (96, 96)
SIZES = ((64, 64), (96, 96), (128, 128), (96, 128), (80, 80))
KEPT = ((96, 96), (128, 128))
DRAWS, BATCH = 1, 125

_SCENES = ["augment.hflip=0"]
MODELS: dict[str, tuple[str, list[str]]] = {
    "pictures": ("pictures", []),
    "pictures, cropped": ("pictures", ["augment.crop_scale=[0.2,1.0]", "augment.crop_ratio=[0.75,1.3333]"]),
    "scenes": ("scenes", _SCENES),
    "scenes, tables alone": (
        "scenes",
        [*_SCENES, "model.overrides.offsets=false", "model.overrides.blocks=[L,L,LD,D]"],
    ),
}
"""Name to the data, and what the training changes in configs/demo/pretrain.yaml."""

CANVAS = 128
SIDES = {"train": (0.4, 2.0), "val": (0.4, 1.0)}
"""Side of a scene in pixels; sides of its pictures as shares of a quarter. Larger ones are cropped, so that training sees parts
of pictures, at the scales that the evaluation has at other sizes."""

WINDOWS: dict[str, dict[str, Any]] = {"follow": {}, "kept": {"window_size": 4}}
"""Windows of the shorter side / 16 (4 at 64), or of 4 as trained, for the sizes of KEPT: their tables then need no resize."""

TABLES = {
    "resize": "resized",
    "sample": "sampled",
    "fresh": "as a new model draws them",
    "noise": "drawn with the trained deviation",
}


def is_table(name: str) -> bool:
    """Whether a parameter is a table of position biases."""
    return name.endswith("bias_table")


def scenes(
    images: np.ndarray, labels: np.ndarray, sides: tuple[float, float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """As many scenes as there are pictures: four pictures, one per quarter, each at a size and place of its own.

    The class is that of the picture at the upper left, so that a network which averages over places must know directions.

    Args:
        images: n x 28 x 28 uint8.

    Returns:
        (n x CANVAS x CANVAS uint8, n labels).
    """
    generator = np.random.default_rng(seed)
    half = CANVAS // 2
    canvas = np.zeros((len(images), CANVAS, CANVAS), np.uint8)
    for index in range(len(images)):
        chosen = [index, *generator.integers(0, len(images), 3)]
        for quarter, (top, left) in zip(chosen, ((0, 0), (0, half), (half, 0), (half, half))):
            side = round(half * math.exp(generator.uniform(*np.log(sides))))
            picture = F.interpolate(
                torch.from_numpy(images[quarter])[None, None].float(),
                (side, side),
                mode="bilinear",
                antialias=True,
            )[0, 0]
            y, x = generator.integers(0, abs(half - side) + 1, 2)
            if side > half:
                picture, y, x = picture[y : y + half, x : x + half], 0, 0
            height, width = picture.shape
            canvas[index, top + y : top + y + height, left + x : left + x + width] = picture.round().byte()
    return canvas, labels


def pack(kind: str, shards: Path) -> Path:
    """Shards of the vendored pictures, or of scenes made of them: 8,000 to train on, 2,000 to evaluate on."""
    if (shards / "done").exists():
        return shards
    shards.mkdir(parents=True, exist_ok=True)
    with resources.as_file(resources.files("dattrain") / "demo") as folder:
        images = folder / "t10k-images-idx3-ubyte.gz"
        if kind == "pictures":
            dattrain("data", "pack", str(images), str(shards), "--holdout", "2000", "--per-shard", "500")
        else:
            x, y = read_idx(str(images)), read_idx(str(folder / "t10k-labels-idx1-ubyte.gz"))
            order = np.random.default_rng(0).permutation(len(y))
            for split, rows in (("train", order[:8000]), ("val", order[8000:])):
                made, labels = scenes(x[rows], y[rows], SIDES[split], seed=len(rows))
                np.savez(shards / f"{split}.npz", images=made, labels=labels)
                source = str(shards / f"{split}.npz")
                dattrain("data", "pack", source, str(shards), "--split", split, "--per-shard", "500")
    (shards / "done").touch()
    return shards


def train(name: str, epochs: int, work: Path) -> Path:
    """The run folder of a model, trained to its end by the command that a user would type."""
    return _train(name, "pretrain", work / _slug(name), work, f"schedule.epochs={epochs}")


def tune(name: str, tables: str, trained: DAT, card: Card, work: Path) -> Path:
    """The run folder of one epoch at another size, which begins with the tables treated as ``tables`` says."""
    start = work / f"{_slug(name)}-{tables}.safetensors"
    at_size = replace(card, img_size=TUNED)
    weights.save(start, laid_out(trained, card, TUNED, tables, {}, 100).state_dict(), at_size)
    size = f"model.img_size={TUNED[0]}"
    schedule = ["schedule.epochs=1", "schedule.warmup_epochs=0.25"]
    return _train(name, "finetune", start.with_suffix(""), work, f"init.from={start}", size, *schedule)


def _train(name: str, recipe: str, run: Path, work: Path, *overrides: str) -> Path:
    kind, own = MODELS[name]
    shards = pack(kind, work / f"shards-{kind}")
    data = [f"data.train={shards}/train-*.tar", f"data.val={shards}/val-*.tar"]
    dattrain(
        "train", str(ROOT / "configs/demo" / f"{recipe}.yaml"), *data, *own, *overrides, "--run", str(run)
    )
    return run


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def dattrain(*arguments: str) -> None:
    """Run a verb of this very installation."""
    subprocess.run([sys.executable, "-m", "dattrain", *arguments], check=True)


def images(run: Path, card: Card) -> tuple[Tensor, Tensor]:
    """(n x 3 x H x W uint8, n labels) of the run's evaluation set: the whole picture at the card's size."""
    config = weights.config_of(run)
    assert config is not None and config.data.val is not None
    whole = replace(card, resize="squash", crop_pct=1.0)
    loader = passes.open_loader(config, whole, config.data.val, passes.Views(), device=torch.device("cpu"))
    try:
        parts = [
            (batch.images[batch.weight > 0].clone(), batch.labels[batch.weight > 0].clone())
            for batch in loader
        ]
    finally:
        loader.close()
    x, y = zip(*parts)
    return torch.cat(x), torch.cat(y)


def laid_out(
    trained: DAT, card: Card, size: tuple[int, int], tables: str, windows: dict[str, Any], seed: int
) -> DAT:
    """The trained model at another size, its tables treated as ``tables`` says."""
    torch.manual_seed(seed)
    overrides = {**(card.overrides or {}), **windows}
    model = create(card.name, num_classes=card.num_classes, img_size=size, **overrides).eval()
    tensors = {name: parameter.detach() for name, parameter in trained.named_parameters()}
    if tables == "sample":
        surgery.resize_for(model, tensors, bias_table="sample")
        return model
    drawn = {name: p.detach().clone() for name, p in model.named_parameters() if is_table(name)}
    surgery.resize_for(model, tensors, bias_table="resize")
    if tables == "resize":
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_table(name):
                value = (
                    drawn[name] if tables == "fresh" else torch.randn_like(parameter) * tensors[name].std()
                )
                parameter.copy_(value)
    return model


@torch.inference_mode()
def score(model: DAT, card: Card, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(hit, cross-entropy in nats) of each image, float64."""
    logits = torch.cat([model(pictures.normalise(part, card)) for part in x.split(BATCH)]).double()
    return (logits.argmax(1) == y).double(), F.cross_entropy(logits, y, reduction="none")


def paired(a: Tensor, b: Tensor) -> list[float]:
    """Mean of a - b over images, and its standard error."""
    difference = a - b
    return [float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))]


def figures(hit: Tensor, loss: Tensor, reference: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Top-1 in percent and cross-entropy in nats, each also paired with the resized tables'."""
    return {
        "top1": 100 * float(hit.mean()),
        "cross_entropy": float(loss.mean()),
        "top1_to_resize": [100 * v for v in paired(hit, reference[0])],
        "cross_entropy_to_resize": paired(loss, reference[1]),
    }


def measure(
    trained: DAT,
    card: Card,
    x: Tensor,
    y: Tensor,
    size: tuple[int, int],
    windows: dict[str, Any],
    base: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """Per treatment of the tables: top-1 in percent and cross-entropy, each paired with the resized tables' (``to_resize``)
    and with the trained model at its own size (``to_trained``)."""
    out: dict[str, Any] = {}
    reference: tuple[Tensor, Tensor] | None = None
    for tables in TABLES:
        seeds = range(DRAWS if tables in ("fresh", "noise") else 1)
        runs = [score(laid_out(trained, card, size, tables, windows, 100 + s), card, x, y) for s in seeds]
        hit, loss = (torch.stack(each).mean(0) for each in zip(*runs))
        reference = reference or (hit, loss)
        to_trained = {"top1_to_trained": [100 * v for v in paired(hit, base[0])]}
        out[tables] = figures(hit, loss, reference) | to_trained
    return out


def deviations(model: DAT) -> dict[str, float]:
    """Standard deviation of each table, in logits."""
    return {
        n.removesuffix(".attn.bias_table"): float(p.detach().std())
        for n, p in model.named_parameters()
        if is_table(n)
    }


def table(done: dict[str, Any]) -> str:
    """Markdown: a table per model and way of choosing windows."""
    lines = []
    for name, model in done["models"].items():
        spread = ", ".join(f"{block} {value:.2f}" for block, value in model["tables"].items())
        lines += [f"### {name}", "", f"Deviation of the trained tables, in logits: {spread}.", ""]
        for windows, sizes in model["sizes"].items():
            if not sizes:
                continue
            lines += [
                "| size, windows | resized: top-1 (to 64 x 64) | sampled | fresh | random, trained deviation "
                "| cross-entropy: resized | sampled | fresh | random |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
            for size, cell in sizes.items():
                resized = cell["resize"]
                top1 = [_pair(cell[t]["top1_to_resize"], 2) for t in ("sample", "fresh", "noise")]
                loss = [_pair(cell[t]["cross_entropy_to_resize"], 3) for t in ("sample", "fresh", "noise")]
                lines.append(
                    f"| {size}, {windows} | {resized['top1']:.2f} ({_pair(resized['top1_to_trained'], 2)}) "
                    f"| {' | '.join(top1)} | {resized['cross_entropy']:.3f} | {' | '.join(loss)} |"
                )
            lines.append("")
        if "tuned" in model:
            resized, fresh = model["tuned"]["resize"], model["tuned"]["fresh"]
            lines += [
                f"After one epoch at {TUNED[0]} x {TUNED[1]}: {resized['top1']:.2f} % from resized tables "
                f"(cross-entropy {resized['cross_entropy']:.3f}); from fresh ones "
                f"{_pair(fresh['top1_to_resize'], 2)} points, {_pair(fresh['cross_entropy_to_resize'], 3)} nats.",
                "",
            ]
    return "\n".join(lines)


def measure_run(run: Path, sizes: list[int]) -> None:
    """Print the table of a run that is there, at its own size and at square ``sizes``."""
    trained, card = weights.load_model(run)
    own = card.img_size if isinstance(card.img_size, tuple) else (card.img_size, card.img_size)
    base = score(trained, card, *images(run, card))
    cells = {}
    for size in (own, *((side, side) for side in sizes)):
        x, y = images(run, replace(card, img_size=size))
        cells[f"{size[0]} x {size[1]}"] = measure(trained, card, x, y, size, {}, base)
    print(
        table({"models": {run.name: {"tables": deviations(trained), "sizes": {"follow": cells}}}}).replace(
            "64 x 64)", f"{own[0]} x {own[1]})"
        )
    )


def _pair(value: list[float], digits: int) -> str:
    return f"{value[0]:+.{digits}f} ± {value[1]:.{digits}f}"


def main() -> None:
    """Train and measure what the results file lacks, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tune", action="store_true", help="also one epoch of fine-tuning at 96 x 96")
    parser.add_argument("--work", type=Path, default=Path("runs/resolution"), help="shards and run folders")
    parser.add_argument("--out", type=Path, default=Path("resolution.json"))
    parser.add_argument("--threads", type=int, default=0, help="of the evaluations; 0 leaves torch's choice")
    parser.add_argument("--run", type=Path, help="measure this run of dattrain train, and nothing else")
    parser.add_argument("--sizes", type=int, nargs="+", default=[], help="of --run, in pixels")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.run:
        measure_run(args.run, args.sizes)
        return
    empty = {"epochs": args.epochs, "draws": DRAWS, "models": {}}
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else empty
    if done["epochs"] != args.epochs:
        parser.error(f"{args.out} holds runs of {done['epochs']} epochs, not {args.epochs}")
    for name in args.models:
        run = train(name, args.epochs, args.work)
        trained, card = weights.load_model(run)
        x, y = images(run, card)
        base = score(trained, card, x, y)
        entry = done["models"].setdefault(name, {"sizes": {key: {} for key in WINDOWS}})
        entry |= {
            "tables": deviations(trained),
            "top1": 100 * float(base[0].mean()),
            "cross_entropy": float(base[1].mean()),
        }
        print(f"{name}: top-1 {entry['top1']:.2f} % at 64 x 64", flush=True)
        if args.tune and "tuned" not in entry:
            x, y = images(run, replace(card, img_size=TUNED))
            reference: tuple[Tensor, Tensor] | None = None
            tuned: dict[str, Any] = {}
            for tables in ("resize", "fresh"):
                model, _ = weights.load_model(tune(name, tables, trained, card, args.work))
                hit, loss = score(model, card, x, y)
                reference = reference or (hit, loss)
                tuned[tables] = figures(hit, loss, reference)
                print(f"  tuned from {tables}: {tuned[tables]['top1']:.2f}", flush=True)
            entry["tuned"] = tuned
            args.out.write_text(json.dumps(done, indent=1) + "\n")
        for size in SIZES:
            x, y = images(run, replace(card, img_size=size))
            for windows, overrides in WINDOWS.items():
                key = f"{size[0]} x {size[1]}"
                if key in entry["sizes"][windows] or (windows == "kept" and size not in KEPT):
                    continue
                cell = measure(trained, card, x, y, size, overrides, base)
                entry["sizes"][windows][key] = cell
                args.out.write_text(json.dumps(done, indent=1) + "\n")
                print(
                    f"  {key}, windows {windows}: "
                    + ", ".join(f"{t} {c['top1']:.2f}" for t, c in cell.items()),
                    flush=True,
                )
    print(table(done))


if __name__ == "__main__":
    main()
