"""``dattrain bench data``: the input pipeline against torchvision's, timm's, webdataset's and DALI, on the same images.

Two tables. In the first, whole pipelines with worker processes take turns over the images; what counts is CPU seconds of
all processes per image, since wall time depends on how many cores happen to be free. In the second, one process
decodes, against nothing but decompressing the same files with libjpeg-turbo: the limit of any decoder that looks at
every pixel. Then a few training steps say what share of their time is spent waiting for data.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.errors import UserError
from dattrain.tools.bench.common import Measurement, Report, add_output_arguments, compare, emit

if TYPE_CHECKING:
    import torch

    from dattrain.config.schema import Config

PIPELINES = "whole pipeline"
DECODING = "one process, decoding alone"
BASELINE = "torchvision ImageFolder, Pillow bicubic"
OURS = "dattrain"
LIMIT = "libjpeg-turbo, decompression alone"
BAR_PIPELINE, BAR_DECODING = 2.2, 0.75
_SHARD = 256
# Level 8 without spread: at level 10, timm's posterize asks for 0 bits, which Pillow 12 and later refuse.
_RANDAUGMENT = "rand-m8-inc1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subverb."""
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--images", type=Path, metavar="DIR", help="image folder to measure on, DIR/<class>/<image>"
    )
    given.add_argument("--shards", metavar="PATTERN", help="indexed tar shards to measure on")
    parser.add_argument(
        "--count",
        type=_count,
        default=2048,
        metavar="N",
        help="images per turn (default 2048); made if none are given",
    )
    parser.add_argument("--workers", type=_count, default=2, metavar="N", help="worker processes (default 2)")
    parser.add_argument("--batch", type=_count, default=64, metavar="N", help="micro-batch (default 64)")
    parser.add_argument(
        "--size", type=_count, default=224, metavar="PX", help="side of the output (default 224)"
    )
    parser.add_argument(
        "--model", default="dat_tiny", metavar="NAME", help="of the training step (default dat_tiny)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=6,
        metavar="N",
        help="training steps for the share of waiting; 0: none (default 6)",
    )
    parser.add_argument(
        "--device",
        default=None,
        metavar="NAME",
        help="of DALI and of the training step (default: cuda, else cpu)",
    )
    add_output_arguments(parser)
    parser.set_defaults(rounds=5)


def run(args: argparse.Namespace) -> int:
    """Run the bench; returns 0 whether or not the bars are met."""
    import torch

    torch.set_num_threads(1)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory(prefix="dattrain-bench-") as made:
        images = prepare(args, Path(made))
        bench = Bench(images, args.workers, args.batch, args.size, device)
        pipelines = compare(
            f"{PIPELINES}, {args.workers} workers",
            bench.pipelines(),
            baseline=BASELINE,
            rounds=args.rounds,
            warmup=1,
            min_seconds=0,
            items=bench.per_turn,
            cpu_clock=cpu_seconds,
            extra=bench.outputs,
        )
        decoders = compare(
            DECODING,
            bench.decoders(),
            baseline=LIMIT,
            rounds=args.rounds,
            warmup=1,
            min_seconds=0,
            items=bench.per_decoding,
            cpu_clock=cpu_seconds,
        )
        rows = [with_cpu_throughput(m) for m in [*pipelines, *decoders]]
        report = Report("Input pipeline", rows, item="image")
        report.notes += [images.describe(), *bars(rows)]
        if args.steps > 0:
            report.notes.append(wait_share(bench, args.model, args.steps))
        if device.type == "cpu":
            report.notes.append(
                "No GPU was used; DALI decoded on the CPU. Not measured: nvJPEG and the GPU's resize."
            )
        emit(report, args)
    return 0


def with_cpu_throughput(m: Measurement) -> Measurement:
    """With images per CPU second as a column."""
    from dataclasses import replace

    assert m.items is not None
    return replace(m, extra={"images per CPU second": m.items / m.cpu.median, **m.extra})


def bars(rows: list[Measurement]) -> list[str]:
    """What the two bars of issue B say of these measurements."""
    lines = []
    for case, bar, against in (
        (PIPELINES, BAR_PIPELINE, BASELINE),
        (DECODING, BAR_DECODING, LIMIT),
    ):
        row = next(m for m in rows if m.name == OURS and m.case.startswith(case))
        ratio = row.cpu_ratio
        lines.append(
            f"Per CPU second, {case}: {ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) times {against}; "
            f"the bar is {bar}: {'met' if ratio.median >= bar else 'NOT met'}."
        )
    return lines


def cpu_seconds() -> float:
    """Of this process and of its children that have ended, user and system."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@dataclass(frozen=True)
class Images:
    """The images measured on: as an image folder and as shards, of the same files."""

    folder: Path
    shards: str
    count: int
    mean_bytes: float
    mean_width: float
    mean_height: float
    made: bool

    def describe(self) -> str:
        """One line for the report."""
        origin = "made from photographs of installed packages" if self.made else "given"
        return (
            f"{self.count} JPEGs, {origin}: {self.mean_bytes / 1e3:.0f} KB and {self.mean_width:.0f} x "
            f"{self.mean_height:.0f} pixels on average."
        )


def prepare(args: argparse.Namespace, made: Path) -> Images:
    """The images as a folder and as shards; what is missing is made in ``made``.

    Raises:
        UserError: fewer images than asked for.
    """
    from dattrain.data import images as formats
    from dattrain.data.dataset import open_dataset
    from dattrain.data.pack import Options, pack
    from dattrain.tools.bench.jpegs import write_folder

    folder, shards = args.images, args.shards
    if folder is None and shards is None:
        folder = made / "images"
        print(f"making {args.count} JPEGs ...", flush=True)
        write_folder(folder, args.count)
    if shards is None:
        pack(open_dataset(str(folder)), made / "shards", Options(per_shard=_SHARD, check=False))
        shards = str(made / "shards")
    dataset = open_dataset(shards)
    count = min(args.count, int(dataset.counts.sum()))
    if count < args.batch * 2:
        raise UserError(f"{shards or folder}: {count} images are too few for batches of {args.batch}")
    places = list(itertools.islice(((s, i) for s, n in enumerate(dataset.counts) for i in range(n)), count))
    sizes, total = [], 0
    for k, (shard, sample) in enumerate(places):
        found = dataset.read(shard, sample)
        total += len(found.data)
        sizes.append(formats.size(found.data))
        if args.shards is not None:
            path = made / "images" / f"{found.label:05d}" / f"{k:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(found.data)
    return Images(
        folder or made / "images",
        shards,
        count,
        total / count,
        sum(w for _, w in sizes) / count,
        sum(h for h, _ in sizes) / count,
        made=args.images is None and args.shards is None,
    )


class Bench:
    """The contenders: functions that take their turn over the images."""

    def __init__(self, images: Images, workers: int, batch: int, size: int, device: torch.device) -> None:
        self.images = images
        self.workers = workers
        self.batch = batch
        self.size = size
        self.device = device
        self.batches = images.count // batch
        self.per_turn = self.batches * batch
        self.per_decoding = min(8, self.batches) * batch
        self.outputs: dict[str, dict[str, float | str | None]] = {}

    def pipelines(self) -> dict[str, Callable[[], object]]:
        """Whole pipelines by name."""
        found: dict[str, Callable[[], object]] = {}

        def add(name: str, output: str, function: Callable[[], object]) -> None:
            found[name] = function
            self.outputs[name] = {"output": output}

        add(BASELINE, "float32, normalised", lambda: self._torchvision(floats=True))
        add(BASELINE + ", uint8", "uint8", lambda: self._torchvision(floats=False))
        add("timm", "uint8, normalised in the trainer", self._timm)
        add("webdataset, Pillow bicubic", "float32, normalised", self._webdataset)
        add(OURS, "uint8", lambda: self._ours(workers=self.workers))
        add(
            f"{OURS}, normalised",
            "float32, normalised in the trainer",
            lambda: self._ours(workers=self.workers, mix=True),
        )
        add(
            f"{OURS}, RandAugment",
            "uint8",
            lambda: self._ours(workers=self.workers, randaugment=_RANDAUGMENT),
        )
        add(
            "timm, RandAugment",
            "uint8, normalised in the trainer",
            lambda: self._timm(_RANDAUGMENT),
        )
        try:
            import nvidia.dali  # noqa: F401
        except ImportError:
            pass
        else:
            add(
                f"{OURS}, DALI decoder on {self.device.type}",
                "uint8",
                lambda: self._ours(workers=1, decoder="dali"),
            )
        return found

    def decoders(self) -> dict[str, Callable[[], object]]:
        """In this process alone."""
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        from dattrain.data import images as formats
        from dattrain.data.dataset import open_dataset

        dataset = open_dataset(self.images.shards)
        places = ((s, i) for s, n in enumerate(dataset.counts) for i in range(n))
        files = [dataset.read(s, i).data for s, i in itertools.islice(places, self.per_decoding)]
        tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]

        def limit() -> None:
            for data in tensors:
                decode_jpeg(data, mode=ImageReadMode.RGB)

        def pillow() -> None:
            for data in files:
                formats.decode_pillow(data).load()

        steps = self.per_decoding // self.batch
        return {
            LIMIT: limit,
            "Pillow, decompression alone": pillow,
            OURS: lambda: self._ours(workers=0, batches=steps),
            f"{OURS}, RandAugment": lambda: self._ours(workers=0, batches=steps, randaugment=_RANDAUGMENT),
        }

    def config(self, *, workers: int, decoder: str = "cpu", randaugment: str | None = None) -> Config:
        """A recipe with this bench's sizes."""
        from dattrain.config.schema import Config

        return Config.model_validate(
            {
                "model": {"num_classes": 100_000},
                "data": {
                    "train": self.images.shards,
                    "workers": workers,
                    "decoder": decoder,
                    "dali_threads": self.workers,
                    "on_bad": "skip",
                },
                "augment": {"randaugment": randaugment},
                "train": {"global_batch": self.batch, "micro_batch": self.batch},
            }
        )

    def _ours(
        self,
        *,
        workers: int,
        batches: int | None = None,
        mix: bool = False,
        decoder: str = "cpu",
        randaugment=None,
    ) -> None:
        import torch

        from dattrain.data.loader import train_loader
        from dattrain.data.mix import Normalize

        config = self.config(workers=workers, decoder=decoder, randaugment=randaugment)
        device = self.device if decoder == "dali" else torch.device("cpu")
        normalize = Normalize(config.augment)
        loader = train_loader(config, rank=0, world=1, samples_seen=0, device=device, img_size=self.size)
        with closing(loader):
            for batch in itertools.islice(loader, batches or self.batches):
                if mix:
                    normalize(batch.images)

    def _transform(self, floats: bool) -> Any:
        from torchvision import transforms as t

        end = (
            [t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
            if floats
            else [t.PILToTensor()]
        )
        crop = t.RandomResizedCrop(self.size, interpolation=t.InterpolationMode.BICUBIC)
        return t.Compose([crop, t.RandomHorizontalFlip(), *end])

    def _torchvision(self, *, floats: bool) -> None:
        from torch.utils.data import DataLoader
        from torchvision.datasets import ImageFolder

        dataset = ImageFolder(str(self.images.folder), self._transform(floats))
        loader: DataLoader[Any] = DataLoader(
            dataset, self.batch, shuffle=True, num_workers=self.workers, drop_last=True
        )
        self._consume(loader)

    def _timm(self, randaugment: str | None = None) -> None:
        import torch
        from timm.data import create_dataset, create_loader

        loader = create_loader(
            create_dataset("", root=str(self.images.folder)),
            (3, self.size, self.size),
            self.batch,
            is_training=True,
            re_prob=0.0,
            color_jitter=0.0,
            auto_augment=randaugment,
            interpolation="bicubic",
            num_workers=self.workers,
            persistent_workers=False,
            pin_memory=False,
            device=torch.device("cpu"),
        )
        self._consume(loader)

    def _webdataset(self) -> None:
        import webdataset

        paths = sorted(str(path) for path in Path(self.images.shards).glob("*.tar"))
        if not paths:
            from dattrain.data.shards import expand

            paths = expand(self.images.shards)
        dataset = (
            webdataset.WebDataset(paths, shardshuffle=len(paths), seed=0, empty_check=False)
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg", "cls")
            .map_tuple(self._transform(True), lambda label: label)
            .batched(self.batch)
        )
        self._consume(
            webdataset.WebLoader(dataset, batch_size=None, num_workers=min(self.workers, len(paths)))
        )

    def _consume(self, loader: Iterable[Any]) -> None:
        for _ in itertools.islice(loader, self.batches):
            pass


def wait_share(bench: Bench, name: str, steps: int) -> str:
    """Train a few steps and say what share of the time went by waiting for data."""
    import torch

    from dattrain.data.loader import train_loader
    from dattrain.data.mix import Mixer
    from dattrain.models.zoo import create

    config = bench.config(workers=bench.workers, randaugment=_RANDAUGMENT)
    device = bench.device
    batch_size = bench.batch if device.type == "cuda" else min(8, bench.batch)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"global_batch": batch_size, "micro_batch": batch_size})
        }
    )
    model = create(name, num_classes=1000, img_size=bench.size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    mixer = Mixer(config.augment, 1000)
    loader = train_loader(config, rank=0, world=1, samples_seen=0, device=device, img_size=bench.size)
    waited = total = started = 0.0
    with closing(loader):
        for step, batch in enumerate(itertools.islice(loader, steps + 1)):
            images, targets, weight = mixer(batch)
            loss = (
                weight * torch.nn.functional.cross_entropy(model(images), targets, reduction="none")
            ).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            wait, now = loader.wait_s, time.perf_counter()
            if step:  # the first one waits for the workers to start
                waited, total = waited + wait, total + now - started
            started = now
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return (
        f"Waiting for data: {100 * waited / total:.1f} % of {steps} training steps of {name}, {batch_size} images of "
        f"{bench.size} px with RandAugment and {bench.workers} workers on {where}, {total / steps:.2f} s a step."
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
