"""The contenders of ``dattrain bench data``: whole pipelines, decoders alone, and training steps that wait for data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from torch.utils.data import DataLoader
from torchvision import transforms as t
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg

from dattrain.bench.data_images import Images
from dattrain.config.schema import Config
from dattrain.data.augment.mixup import MixupCutmix, Normalize
from dattrain.data.decode import images as formats
from dattrain.data.decode.dali_pipeline import require
from dattrain.data.factory import train_loader
from dattrain.data.fork import kept
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.shards import expand
from dattrain.models.zoo import create

BASELINE = "torchvision ImageFolder, Pillow bicubic"
OURS = "dattrain"
LIMIT = "libjpeg-turbo, decompression alone"
# Level 8 without spread: at level 10, timm's posterize asks for 0 bits, which Pillow 12 and later refuse.
_RANDAUGMENT = "rand-m8-inc1"


def _dali_is_there() -> bool:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


class Pipelines:
    """The contenders: functions that take their turn over the images."""

    def __init__(self, images: Images, workers: int, batch: int, size: int, device: torch.device) -> None:
        self.images = images
        self.workers = workers
        self.batch = batch
        self.size = size
        self.device = device
        self.batches = images.count // batch
        self.per_turn = self.batches * batch
        self.outputs: dict[str, dict[str, float | str | None]] = {}

    def pipelines(self) -> dict[str, Callable[[], object]]:
        """Whole pipelines by name."""
        found: dict[str, Callable[[], object]] = {}

        def add(name: str, output: str, function: Callable[[], object]) -> None:
            found[name] = function
            self.outputs[name] = {"output": output}

        add(BASELINE, "float32, normalised", partial(self._torchvision, floats=True))
        add(BASELINE + ", uint8", "uint8", partial(self._torchvision, floats=False))
        add("timm", "uint8, normalised in the trainer", self._timm)
        add("webdataset, Pillow bicubic", "float32, normalised", self._webdataset)
        ours = partial(self._ours, workers=self.workers)
        add(OURS, "uint8", ours)
        add(f"{OURS}, normalised", "float32, normalised in the trainer", partial(ours, mix=True))
        add(f"{OURS}, RandAugment", "uint8", partial(ours, randaugment=_RANDAUGMENT))
        add("timm, RandAugment", "uint8, normalised in the trainer", partial(self._timm, _RANDAUGMENT))
        if _dali_is_there():
            one_worker = partial(self._ours, workers=1, decoder="dali")
            add(f"{OURS}, DALI decoder on {self.device.type}", "uint8", one_worker)
        return found

    def decoders(self) -> dict[str, Callable[[], object]]:
        """In this process alone."""
        dataset = open_dataset(self.images.shards)
        places = ((s, i) for s, n in enumerate(dataset.counts) for i in range(n))
        files = [dataset.read(s, i).data for s, i in itertools.islice(places, self.per_turn)]
        tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]

        def limit() -> None:
            for data in tensors:
                decode_jpeg(data, mode=ImageReadMode.RGB)

        def pillow() -> None:
            for data in files:
                formats.decode_pillow(data).load()

        ours = partial(self._ours, workers=0)
        found: dict[str, Callable[[], object]] = {
            LIMIT: limit,
            "Pillow, decompression alone": pillow,
            OURS: ours,
            f"{OURS}, RandAugment": partial(ours, randaugment=_RANDAUGMENT),
        }
        if _dali_is_there():
            arrays = [np.frombuffer(data, dtype=np.uint8) for data in files]
            found["DALI on cpu, decompression alone"] = partial(self._dali_decompression, arrays)
            if self.device.type == "cpu":
                one_thread = partial(self._ours, workers=1, decoder="dali", dali_threads=1)
                found[f"{OURS}, DALI decoder on cpu"] = one_thread
        return found

    def _dali_decompression(self, files: list[NDArray[np.uint8]]) -> None:
        from nvidia.dali import Pipeline

        fn, types = require()

        pipeline = Pipeline(batch_size=self.batch, num_threads=1, device_id=None)
        batches = [files[at : at + self.batch] for at in range(0, self.per_turn, self.batch)]
        with pipeline:
            encoded = fn.external_source(source=batches, batch=True)
            pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False))
        pipeline.build()
        for _ in batches:
            pipeline.run()

    def config(
        self,
        *,
        workers: int,
        decoder: str = "cpu",
        randaugment: str | None = None,
        dali_threads: int | None = None,
    ) -> Config:
        """A recipe with this bench's sizes."""
        dataset = open_dataset(self.images.shards)
        dataset.close()
        # Bare numbers say nothing of those that are not there: as many outputs as ImageNet's, or as the largest takes.
        classes = max(1000, dataset.max_label + 1) if dataset.classes is None else len(dataset.classes)
        return Config.model_validate(
            {
                "model": {"num_classes": classes},
                "data": {
                    "train": self.images.shards,
                    "workers": workers,
                    "decoder": decoder,
                    "dali_threads": dali_threads or self.workers,
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
        mix: bool = False,
        decoder: str = "cpu",
        randaugment: str | None = None,
        dali_threads: int | None = None,
    ) -> None:

        config = self.config(
            workers=workers, decoder=decoder, randaugment=randaugment, dali_threads=dali_threads
        )
        device = self.device if decoder == "dali" else torch.device("cpu")
        normalize = Normalize(config.augment)
        loader = train_loader(config, rank=0, world=1, samples_seen=0, device=device, img_size=self.size)
        with closing(loader):
            for batch in itertools.islice(loader, self.batches):
                if mix:
                    normalize(batch.images)

    def _transform(self, floats: bool) -> Any:

        end = (
            [t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
            if floats
            else [t.PILToTensor()]
        )
        crop = t.RandomResizedCrop(self.size, interpolation=t.InterpolationMode.BICUBIC)
        return t.Compose([crop, t.RandomHorizontalFlip(), *end])

    def _torchvision(self, *, floats: bool) -> None:

        dataset = ImageFolder(str(self.images.folder), self._transform(floats))
        loader: DataLoader[Any] = DataLoader(
            dataset, self.batch, shuffle=True, num_workers=self.workers, drop_last=True
        )
        self._consume(loader)

    def _timm(self, randaugment: str | None = None) -> None:

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

        paths = sorted(str(path) for path in Path(self.images.shards).glob("*.tar"))
        if not paths:
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
        # The contender before may have left a DALI pipeline, which these workers must not finalise; some fork when first asked.
        with kept():
            batches = itertools.islice(loader, self.batches)
            next(batches, None)
        for _ in batches:
            pass


def wait_share(bench: Pipelines, name: str, steps: int) -> str:
    """Train a few steps and say what share of the time went by waiting for data."""
    config = bench.config(workers=bench.workers, randaugment=_RANDAUGMENT)
    device = bench.device
    batch_size = bench.batch if device.type == "cuda" else min(8, bench.batch)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"global_batch": batch_size, "micro_batch": batch_size})
        }
    )
    classes = config.model.num_classes
    model = create(name, num_classes=classes, img_size=bench.size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    mixer = MixupCutmix(config.augment, classes)
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
