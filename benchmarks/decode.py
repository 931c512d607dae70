"""What an image costs until it is a training crop, by its size: ``python -m benchmarks.decode``.

Each image is decoded in full and cropped as a plan says; decoded as training does it, which reduces JPEGs of large crops (see
``dattrain.data.augment.plan.reduction``); and packed smaller beforehand (``dattrain data pack --resize``). One process, in turns. Beside
the time stands what changes in the pixels that the network gets.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dattrain.bench.common import BenchReport, Measurement, compare
from dattrain.bench.data import cpu_seconds, with_cpu_throughput
from dattrain.bench.jpegs import CLASSES, photographs, write_folder
from dattrain.cli.arguments import positive
from dattrain.cli.bench_output import add_output_arguments, emit
from dattrain.config.data_sections import Augment
from dattrain.data.augment.cpu_transforms import eval_image, train_image
from dattrain.data.augment.plan import AugmentPlan, crop_box, draw
from dattrain.data.decode import images
from dattrain.data.decode.cpu import decode_training
from dattrain.data.prepare.pack import pack
from dattrain.data.prepare.write_shard import PackOptions
from dattrain.data.source.dataset import open_dataset

IMAGENET = "500 x 375"
SIZES = {"1600 x 1200": (1600, 1200), "4000 x 3000": (4000, 3000), "6000 x 4000": (6000, 4000)}
SHORT_SIDES = (512, 384, 256)
FULL, OURS = "decoded in full", "dattrain"


def mosaic(photos: Sequence[Image.Image], size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Pieces of photographs side by side, none enlarged: as sharp at each pixel as they are, which a camera's often are not."""
    whole = Image.new("RGB", size)
    side = 400
    for y in range(0, size[1], side):
        x = 0
        while x < size[0]:
            photo = photos[int(rng.integers(len(photos)))]
            w, h = min(side, photo.width), min(side, photo.height)
            left, top = (int(rng.integers(0, room + 1)) for room in (photo.width - w, photo.height - h))
            piece = photo.crop((left, top, left + w, top + h))
            whole.paste(piece if h == side else piece.resize((w, side)), (x, y))
            x += w
    return whole


def write_large(folder: Path, count: int, size: tuple[int, int], photos: Sequence[Image.Image]) -> None:
    """``count`` mosaics as JPEGs of quality 90, 4:2:0, in one class folder."""
    rng = np.random.default_rng(0)
    (folder / "00").mkdir(parents=True)
    for i in range(count):
        mosaic(photos, size, rng).save(folder / f"00/{i:06d}.jpg", quality=90, subsampling="4:2:0")


def in_full(data: bytes, plan: AugmentPlan, i: int, out: torch.Tensor) -> None:
    """As ``decode_training``, from every pixel."""
    train_image(images.decode(data), plan, i, out)


def evaluated(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """The central crop of an evaluation."""
    out = torch.empty(*size, 3, dtype=torch.uint8)
    eval_image(images.decode(data), size, out, policy="shorter", crop_pct=0.875, interpolation="bicubic")
    return out.numpy().astype(int)


def same_part(data: bytes, part: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """``part`` (left, top, right, bottom, of 1) of an image, resized between pixels."""
    image = images.decode_pillow(data)
    left, top, right, bottom = (edge * side for edge, side in zip(part, image.size * 2))
    pixels = image.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return np.asarray(pixels).astype(int)


def compared(
    name: str, originals: Sequence[bytes], files: Sequence[bytes], plan: AugmentPlan
) -> dict[str, float | str | None]:
    """What differs from decoding the originals in full: in crops (of packed images between equal edges) and in evaluation."""
    size, changes, enlarged, evaluation = plan.size, [], [], []
    for i, (original, data) in enumerate(zip(originals, files)):
        height, width = images.size(original)
        _, _, *sides = crop_box(plan.crop[i], *images.size(data), plan.crop_ratio)
        enlarged.append(sides[0] < size[0] or sides[1] < size[1])
        if original is data:
            pair = []
            for decode in (in_full, decode_training if name == OURS else in_full):
                out = torch.empty(*size, 3, dtype=torch.uint8)
                decode(data, plan, i, out)
                pair.append(out.numpy().astype(int))
        else:
            top, left, h, w = crop_box(plan.crop[i], height, width, plan.crop_ratio)
            part = left / width, top / height, (left + w) / width, (top + h) / height
            pair = [same_part(each, part, size) for each in (original, data)]
            evaluation.append(np.abs(evaluated(original, size) - evaluated(data, size)).mean())
        changes.append(np.abs(pair[0] - pair[1]))
    return {
        "KB an image": sum(map(len, files)) / len(files) / 1e3,
        "crops enlarged": f"{100 * np.mean(enlarged):.0f} %",
        "mean difference": f"{np.mean(changes):.2f}",
        "of the worst image": f"{max(each.mean() for each in changes):.2f}",
        "largest": float(max(each.max() for each in changes)),
        "in evaluation, mean": f"{np.mean(evaluation):.2f}" if evaluation else "0",
    }


def bench(case: str, folder: Path, *, side: int, rounds: int, notes: list[str]) -> list[Measurement]:
    """Measure the images of a folder at crops of ``side`` pixels; packs them beside it."""
    found = open_dataset(str(folder))
    count = int(found.counts.sum())
    originals = [found.read(0, i).data for i in range(count)]
    by_name = {FULL: originals, OURS: originals}
    for short in SHORT_SIDES:
        if min(images.size(originals[0])) <= short:
            continue
        out = folder.parent / f"{folder.name}-{short}"
        begin = cpu_seconds()
        pack(open_dataset(str(folder)), out, PackOptions(seed=None, resize=short, check=False))
        notes.append(
            f"{case}: `data pack --resize {short}` took {(cpu_seconds() - begin) / count * 1e3:.0f} CPU ms an image, once."
        )
        packed = open_dataset(str(out))
        places = [(s, i) for s, n in enumerate(packed.counts) for i in range(n)]
        by_name[f"packed, --resize {short}"] = [packed.read(*place).data for place in places]
    # As many crops as make the mean over their areas steady.
    draws = -(-64 // count)
    plans = [draw(Augment(randaugment=None), seed, np.arange(count), (side, side)) for seed in range(draws)]
    contenders: dict[str, Callable[[], object]] = {}
    for name, files in by_name.items():
        contenders[name] = partial(_turn, in_full if name == FULL else decode_training, files, plans)
    extra = {name: compared(name, originals, files, plans[0]) for name, files in by_name.items()}
    rows = compare(
        case, contenders, baseline=FULL, rounds=rounds, warmup=1, min_seconds=0, items=count * draws, extra=extra
    )  # fmt: skip
    return [with_cpu_throughput(row) for row in rows]


def _turn(decode: Callable[..., None], files: Sequence[bytes], plans: Sequence[AugmentPlan]) -> None:
    out = torch.empty(*plans[0].size, 3, dtype=torch.uint8)
    for plan in plans:
        for i, data in enumerate(files):
            decode(data, plan, i, out)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--count", type=positive, default=64, metavar="N", help="images of ImageNet's size, 10 or more (64)"
    )
    parser.add_argument(
        "--large", type=positive, default=8, metavar="N", help="images of each larger size (8)"
    )
    parser.add_argument("--size", type=positive, default=224, metavar="PX", help="side of the crops (224)")
    parser.add_argument(
        "--photographs", type=Path, metavar="DIR", help="to be pieced together, beside matplotlib's"
    )
    add_output_arguments(parser)
    parser.set_defaults(rounds=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    photos = photographs()
    if args.photographs is not None:
        photos += [Image.open(path).convert("RGB") for path in sorted(args.photographs.iterdir())]
    rows: list[Measurement] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="dattrain-decode-") as made:
        given: dict[str, Any] = {"side": args.size, "rounds": args.rounds, "notes": notes}
        write_folder(Path(made) / "imagenet", max(CLASSES, args.count))
        rows += bench(IMAGENET, Path(made) / "imagenet", **given)
        for name, size in SIZES.items():
            write_large(Path(made) / name.replace(" ", ""), args.large, size, photos)
            rows += bench(name, Path(made) / name.replace(" ", ""), **given)
    report = BenchReport("Decoding by image size", rows, item="image", notes=notes)
    report.command = shlex.join(
        ["python", "-m", "benchmarks.decode", *(sys.argv[1:] if argv is None else argv)]
    )
    notes.insert(
        0,
        f"Larger images are pieces of {len(photos)} photographs side by side, none enlarged, at quality 90.",
    )
    emit(report, args)


if __name__ == "__main__":
    main()
