"""What a change of resolution costs without training, and what the position tables have to do with it.

Trains dat_atto by the demo's recipe (``dattrain train``), lays it out for other sizes, trains nothing, and evaluates it with its
tables resized, sampled, left as a new model draws them, and drawn with the trained tables' own deviation. All figures of a
size come from the same 2,000 images, so differences are paired.

    python -m benchmarks.resolution --data scenes --size 128 --sizes 160 192 224
    python -m benchmarks.resolution --run runs/mine --sizes 160 192     # a run of yours: nothing is trained
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.data.prepare.arrays import read_idx
from dattrain.evaluation import inference
from dattrain.models import create, surgery
from dattrain.models.dat import DAT
from dattrain.pretrained import preprocess, weights
from dattrain.pretrained.pretrained_cfg import PretrainedCfg

ROOT = Path(__file__).parents[1]
BATCH = 125
CROPS = ["augment.crop_scale=[0.25,1.0]", "augment.crop_ratio=[0.75,1.3333]"]
DATA = {"pictures": CROPS, "scenes": ["augment.hflip=0"]}
"""Name to what its training changes in configs/demo/pretrain.yaml."""

CANVAS = 128
"""Side of a scene in pixels, before it is resampled."""
VARIETY = {"train": ((0.4, 1.5), 0.15, 2), "val": ((0.5, 1.0), 0.0, 1)}
"""Sides of a scene's pictures as shares of the quarter's shorter one; how far, as a share of the scene, the quarters' corner lies
from its centre at most; scenes per picture. Training sees pictures larger and smaller than evaluation shows, and quarters that
begin anywhere in a patch, as those of another size will."""

TABLES = ("resized", "sampled", "fresh", "random")


def scenes(
    images: np.ndarray, labels: np.ndarray, sides: tuple[float, float], shift: float, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """``draws`` scenes per picture: four pictures, one per quarter, each at a size and place of its own.

    The class is that of the picture at the upper left, so that a network which averages over places must know directions.

    Args:
        images: n x 28 x 28 uint8.

    Returns:
        (draws * n x CANVAS x CANVAS uint8, draws * n labels).
    """
    generator = np.random.default_rng(seed)
    canvas = np.zeros((draws * len(images), CANVAS, CANVAS), np.uint8)
    for index, scene in enumerate(canvas):
        chosen = [index % len(images), *generator.integers(0, len(images), 3)]
        y, x = np.round(CANVAS * generator.uniform(0.5 - shift, 0.5 + shift, 2)).astype(int)
        for picture, quarter in zip(chosen, (scene[:y, :x], scene[:y, x:], scene[y:, :x], scene[y:, x:])):
            _put(quarter, images[picture], math.exp(generator.uniform(*np.log(sides))), generator)
    return canvas, np.tile(labels, draws)


def _put(quarter: np.ndarray, image: np.ndarray, share: float, generator: np.random.Generator) -> None:
    """Put ``image``, as a square of ``share`` of the quarter's shorter side, anywhere in it; what is too large is cut."""
    side = round(min(quarter.shape) * share)
    square = F.interpolate(
        torch.from_numpy(image)[None, None].float(), (side, side), mode="bilinear", antialias=True
    )
    y, x = (int(generator.integers(min(0, n - side), max(0, n - side) + 1)) for n in quarter.shape)
    part = square[0, 0].round().byte().numpy()[max(-y, 0) :, max(-x, 0) :]
    y, x = max(y, 0), max(x, 0)
    part = part[: quarter.shape[0] - y, : quarter.shape[1] - x]
    quarter[y : y + part.shape[0], x : x + part.shape[1]] = part


def pack(data: str, shards: Path) -> Path:
    """Shards of the vendored pictures, or of scenes made of them: 8,000 pictures to train on, 2,000 to evaluate on."""
    if (shards / "done").exists():
        return shards
    shards.mkdir(parents=True, exist_ok=True)
    with resources.as_file(resources.files("dattrain") / "demo") as folder:
        images = folder / "t10k-images-idx3-ubyte.gz"
        if data == "pictures":
            dattrain("data", "pack", str(images), str(shards), "--holdout", "2000", "--per-shard", "500")
        else:
            x, y = read_idx(str(images)), read_idx(str(folder / "t10k-labels-idx1-ubyte.gz"))
            order = np.random.default_rng(0).permutation(len(y))
            for split, rows in (("train", order[:8000]), ("val", order[8000:])):
                made, labels = scenes(x[rows], y[rows], *VARIETY[split], seed=len(rows))
                source = shards / f"{split}.npz"
                np.savez(source, images=made, labels=labels)
                dattrain("data", "pack", str(source), str(shards), "--split", split, "--per-shard", "500")
    (shards / "done").touch()
    return shards


def train(data: str, size: int, epochs: int, overrides: Sequence[str], work: Path) -> Path:
    """The run folder of a model, trained to its end (or on to it) by the command that a user would type."""
    shards, run = pack(data, work / f"shards-{data}"), work / f"{data}-{size}"
    dattrain(
        "train",
        str(ROOT / "configs/demo/pretrain.yaml"),
        f"data.train={shards}/train-*.tar",
        f"data.val={shards}/val-*.tar",
        f"model.img_size={size}",
        f"schedule.epochs={epochs}",
        *DATA[data],
        *overrides,
        "--run",
        str(run),
    )
    return run


def dattrain(*arguments: str) -> None:
    """Run a verb of this very installation."""
    subprocess.run([sys.executable, "-m", "dattrain", *arguments], check=True)


def images(run: Path, cfg: PretrainedCfg) -> tuple[Tensor, Tensor]:
    """(n x 3 x H x W uint8, n labels) of the run's evaluation set: the whole picture at the pretrained config's size."""
    config = weights.config_of(run)
    assert config is not None and config.data.val is not None
    whole = replace(cfg, resize="squash", crop_pct=1.0)
    loader = inference.open_loader(
        config, whole, config.data.val, inference.Views(), device=torch.device("cpu")
    )
    try:
        parts = [
            (batch.images[batch.weight > 0].clone(), batch.labels[batch.weight > 0].clone())
            for batch in loader
        ]
    finally:
        loader.close()
    x, y = zip(*parts)
    return torch.cat(x), torch.cat(y)


def is_table(name: str) -> bool:
    """Whether a parameter is a table of position biases."""
    return name.endswith("bias_table")


def laid_out(trained: DAT, cfg: PretrainedCfg, size: tuple[int, int], tables: str) -> DAT:
    """The trained model at another size, its tables treated as ``tables`` says (one of TABLES)."""
    torch.manual_seed(100)
    model = create(cfg.name, num_classes=cfg.num_classes, img_size=size, **(cfg.overrides or {})).eval()
    tensors = {name: parameter.detach() for name, parameter in trained.named_parameters()}
    drawn = {name: p.detach().clone() for name, p in model.named_parameters() if is_table(name)}
    surgery.resize_for(model, tensors, bias_table="sample" if tables == "sampled" else "resize")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_table(name) and tables == "fresh":
                parameter.copy_(drawn[name])
            elif is_table(name) and tables == "random":
                parameter.normal_(std=float(tensors[name].std()))
    return model


@torch.inference_mode()
def score(model: DAT, cfg: PretrainedCfg, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(hit in percent, cross-entropy in nats) of each image, float64."""
    logits = torch.cat([model(preprocess.normalise(part, cfg)) for part in x.split(BATCH)]).double()
    return 100 * (logits.argmax(1) == y).double(), F.cross_entropy(logits, y, reduction="none")


def paired(a: Tensor, b: Tensor, digits: int) -> str:
    """Mean of a - b over images, and its standard error."""
    difference = a - b
    return f"{difference.mean():+.{digits}f} ± {difference.std() / math.sqrt(len(difference)):.{digits}f}"


def table(run: Path, sizes: Sequence[int]) -> str:
    """Markdown: the run at its own size and at square ``sizes``, a column per treatment of the tables."""
    trained, cfg = weights.load_classifier(run, "this table")
    own = cfg.img_size if isinstance(cfg.img_size, tuple) else (cfg.img_size, cfg.img_size)
    base, _ = score(trained, cfg, *images(run, cfg))
    spread = ", ".join(
        f"{name.removesuffix('.attn.bias_table')} {p.detach().std():.2f}"
        for name, p in trained.named_parameters()
        if is_table(name)
    )
    compared = TABLES[1:]
    lines = [
        f"Deviation of the trained tables, in logits: {spread}.",
        "",
        f"| size | resized: top-1 (to {own[0]} x {own[1]}) | {' | '.join(compared)} "
        f"| cross-entropy: resized | {' | '.join(compared)} |",
        "|" + "---|" * (3 + 2 * len(compared)),
    ]
    for size in (own, *((side, side) for side in sizes)):
        x, y = images(run, replace(cfg, img_size=size))
        hits, losses = zip(*(score(laid_out(trained, cfg, size, tables), cfg, x, y) for tables in TABLES))
        cells = [
            f"{size[0]} x {size[1]}",
            f"{hits[0].mean():.2f} ({paired(hits[0], base, 2)})",
            *(paired(hit, hits[0], 2) for hit in hits[1:]),
            f"{losses[0].mean():.3f}",
            *(paired(loss, losses[0], 3) for loss in losses[1:]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    """Train what is not trained yet, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=list(DATA), default="scenes")
    parser.add_argument("--size", type=int, default=128, help="trained at, in pixels")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 192, 224], help="evaluated at")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("runs/resolution"), help="shards and run folders")
    parser.add_argument("--run", type=Path, help="measure this run of dattrain train, and train nothing")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the training's recipe")
    args = parser.parse_args()
    run = args.run or train(args.data, args.size, args.epochs, args.set, args.work)
    print(table(run, args.sizes))


if __name__ == "__main__":
    main()
