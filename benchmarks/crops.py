"""Training crops of segmentation per CPU second, by torchvision's transforms and by ours: ``python -m benchmarks.crops``.

Both make crops of 512 x 512 by ADE20K's recipe (scale .5 to 2, the 75 % rule, flip, photometric distortion) from JPEGs of 683 x 512,
one process each, in turns. torchvision has no 75 % rule; beside it stands what no pipeline is rid of, decoding image and map.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from dattrain.bench.common import BenchReport, compare
from dattrain.bench.data import with_cpu_throughput
from dattrain.bench.jpegs import photographs
from dattrain.cli.arguments import positive
from dattrain.cli.bench_output import add_output_arguments, emit
from dattrain.config.schema import Config
from dattrain.data.annotations import maps
from dattrain.data.annotations.map_folder import ADE_NAMES
from dattrain.data.annotations.maps import VOID
from dattrain.data.decode import images
from dattrain.data.dense_factory import train_loader
from dattrain.data.prepare.pack import pack
from dattrain.data.prepare.write_shard import PackOptions
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.sample import Sample

CROP, SHORT, LONG, CLASSES = 512, 512, 2048, 150
SIZE = (512, 683)
DECODING, TORCHVISION, OURS = "decoding alone", "torchvision v2", "dattrain"


def write_set(root: Path, count: int, size: tuple[int, int] = SIZE) -> Path:
    """An ADE20K-like folder of JPEGs with grain (quality 90) and maps of about 30 regions; returns the folder to name."""
    rng = np.random.default_rng(0)
    sources = photographs()
    for kind in ("images", "annotations"):
        (root / kind / "training").mkdir(parents=True)
    rows = "".join(f"{k}\t0\t1\t1\tthing{k}\n" for k in range(1, CLASSES + 1))
    (root / ADE_NAMES).write_text(f"Idx\tRatio\tTrain\tVal\tName\n{rows}")
    y, x = np.mgrid[: size[0], : size[1]]
    for i in range(count):
        photo = sources[i % len(sources)].resize(size[::-1], Image.Resampling.BICUBIC)
        pixels = np.asarray(photo) + rng.normal(0, 7, (*size, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
            root / f"images/training/{i:05d}.jpg", quality=90
        )
        nearest, least = np.zeros(size, np.uint8), np.full(size, np.inf)
        for number in rng.integers(0, CLASSES + 1, 30).tolist():
            distance = (y - rng.uniform(0, size[0])) ** 2 + (x - rng.uniform(0, size[1])) ** 2
            nearest[distance < least], least = number, np.minimum(least, distance)
        (root / f"annotations/training/{i:05d}.png").write_bytes(maps.write(nearest))
    return root / "images/training"


def contenders(folder: Path, count: int, crop: int = CROP) -> dict[str, Callable[[], object]]:
    """Functions that each make ``count`` crops of the set, packed into shards beside it, in this process."""
    shards = folder.parents[1] / "shards"
    pack(open_dataset(str(folder)), shards, PackOptions(check=False))
    with closing(open_dataset(str(shards))) as dataset:
        samples = [dataset.read(0, i) for i in range(count)]
    config = recipe(shards, count, crop)
    transform = v2.Compose(
        [
            v2.ScaleJitter((LONG, SHORT), (0.5, 2.0), v2.InterpolationMode.BILINEAR, antialias=True),
            v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: VOID}),
            v2.RandomHorizontalFlip(),
            # Hue of 18 of OpenCV's 180; each of four with probability 1/2, as the recipe has it.
            v2.RandomPhotometricDistort((0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1)),
        ]
    )

    def decode(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        return images.decode(sample.data), torch.from_numpy(maps.read(sample.annotation, sample.where))

    def decoding() -> None:
        for sample in samples:
            decode(sample)

    def torchvision() -> None:
        for sample in samples:
            image, classes = decode(sample)
            found: Any = transform(tv_tensors.Image(image), tv_tensors.Mask(classes))
            assert found[0].shape[1:] == found[1].shape == (crop, crop)

    def ours() -> None:
        with closing(
            train_loader(config, rank=0, world=1, samples_seen=0, device=torch.device("cpu"))
        ) as loader:
            for batch in itertools.islice(loader, count):
                assert batch.maps.shape == (1, crop, crop)

    return {DECODING: decoding, TORCHVISION: torchvision, OURS: ours}


def recipe(shards: Path, count: int, crop: int) -> Config:
    """ADE20K's, of one process and micro-batches of one."""
    off: dict[str, Any] = {"mix_prob": 0, "randaugment": None, "erase_prob": 0, "label_smoothing": 0}
    return Config.model_validate(
        {
            "task": {"kind": "segmentation"},
            "model": {"num_classes": CLASSES},
            "data": {"train": str(shards), "workers": 0},
            "geometry": {"short_side": SHORT, "long_side": LONG, "crop": crop},
            "augment": {**off, "interpolation": "bilinear"},
            "eval": {"batch": 1},
            "train": {"global_batch": count, "micro_batch": 1},
        }
    )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=positive, default=64, metavar="N", help="crops per turn (default 64)")
    add_output_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dattrain-bench-") as made:
        functions = contenders(write_set(Path(made), args.count), args.count)
        found = compare(
            f"crops of {CROP} x {CROP}, one process",
            functions,
            baseline=TORCHVISION,
            rounds=args.rounds,
            warmup=1,
            items=args.count,
        )
    report = BenchReport(
        "Training crops of segmentation",
        [with_cpu_throughput(m) for m in found],
        item="image",
        command=shlex.join(["python", "-m", "benchmarks.crops", *sys.argv[1:]]),
    )
    emit(report, args)


if __name__ == "__main__":
    main()
