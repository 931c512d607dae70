"""The CPU decoder: worker processes that turn micro-batch numbers into uint8 batches in shared memory.

torch's ``DataLoader`` runs the processes and keeps their results in order; what it is given is a map from the number
of a micro-batch to the finished batch, so a worker needs no state and no copy of the data set's list.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from dattrain.data import images
from dattrain.data.batch import Batch
from dattrain.data.dataset import Dataset
from dattrain.data.feed import Encoded, EvalFeed, TrainFeed, bad_sample_message, fetch
from dattrain.data.transforms import eval_image, train_image
from dattrain.errors import UserError


@dataclass(frozen=True)
class EvalTransform:
    """Evaluation geometry: see ``augment.eval_geometry``."""

    resize: str
    crop_pct: float
    interpolation: str


class CpuDecoder(TorchDataset):
    """Map from the number of a micro-batch to the decoded batch.

    Args:
        transform: None in training, where the plan says what is done.
    """

    def __init__(
        self,
        dataset: Dataset,
        feed: TrainFeed | EvalFeed,
        *,
        size: tuple[int, int],
        num_classes: int,
        skip_bad: bool,
        transform: EvalTransform | None = None,
    ) -> None:
        self.dataset = dataset
        self.feed = feed
        self.size = size
        self.num_classes = num_classes
        self.skip_bad = skip_bad
        self.transform = transform

    def __getitem__(self, number: int) -> Batch | str:
        """The batch, or the message of a UserError: torch would wrap an exception's text in a traceback."""
        try:
            return self.decode(number)
        except UserError as error:
            return str(error)

    def decode(self, number: int) -> Batch:
        """Read and decode micro-batch ``number``. Raises UserError as ``feed.fetch`` does."""
        encoded = fetch(
            self.dataset,
            self.feed.request(number),
            num_classes=self.num_classes,
            skip_bad=self.skip_bad,
        )
        plan, bad = encoded.request.plan, dict(encoded.bad)
        pixels = _shared_empty((len(encoded.data), *self.size, 3))
        for i, data in enumerate(encoded.data):
            if data is not None:
                try:
                    image = images.decode(data)
                except images.BadImage as error:
                    bad[i] = f"{encoded.where[i]}: {error}"
                    if not self.skip_bad:
                        raise UserError(bad_sample_message(bad[i])) from error
                else:
                    if plan is not None:
                        train_image(image, plan, i, pixels[i])
                    elif self.transform is not None:
                        t = self.transform
                        eval_image(
                            image,
                            self.size,
                            pixels[i],
                            policy=t.resize,
                            crop_pct=t.crop_pct,
                            interpolation=t.interpolation,
                        )
            if i in bad:
                pixels[i].zero_()
        return assemble(pixels.permute(0, 3, 1, 2), encoded, bad)


def assemble(pixels: torch.Tensor, encoded: Encoded, bad: dict[int, str]) -> Batch:
    """The batch of decoded ``pixels`` (B x 3 x H x W); bad samples get label 0 and weight 0, and are not mixed."""
    weight = np.ones(len(encoded.keys), dtype=np.float32)
    labels = encoded.labels.copy()
    plan = encoded.request.plan
    if bad:
        weight[list(bad)] = 0
        labels[list(bad)] = 0
        if plan is not None:
            plan = plan.without_mixing(weight == 0)
    return Batch(
        images=pixels,
        labels=torch.from_numpy(labels),
        weight=torch.from_numpy(weight),
        position=torch.from_numpy(encoded.request.positions),
        keys=encoded.keys,
        plan=plan,
        bad=tuple((encoded.keys[i], bad[i]) for i in sorted(bad)),
    )


class _From(Sampler[int]):
    """Numbers from 0 on, ``count`` of them or without end."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        number = 0
        while self.count is None or number < self.count:
            yield number
            number += 1


class Workers:
    """Decoded batches in order, from ``workers`` processes (0: in this one), with ``prefetch`` ready in each.

    Raises:
        UserError: from the iterator, whatever the decoder raised.
    """

    def __init__(
        self, decoder: CpuDecoder, *, count: int | None, workers: int, prefetch: int, pin: bool
    ) -> None:
        before = set(multiprocessing.active_children())
        loader: DataLoader[Any] = DataLoader(
            decoder,
            batch_size=None,
            sampler=_From(count),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker if workers else None,
            multiprocessing_context="fork" if workers else None,
            pin_memory=pin,
            # Without one of its own the loader would draw from, and so move, torch's global generator.
            generator=torch.Generator(),
        )
        self._iterator: Iterator[Batch | str] | None = iter(loader)
        self.processes = [p for p in multiprocessing.active_children() if p not in before]

    def __iter__(self) -> Workers:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        batch = next(self._iterator)
        if isinstance(batch, str):
            self.close()
            raise UserError(batch)
        return batch

    def close(self) -> None:
        """End the processes; returns when they are gone."""
        # Letting go of torch's iterator asks its workers to end, after the batch at hand.
        self._iterator = None
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self.processes = []


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """Settings of a worker process: one thread; signals are the trainer's business; gone when the trainer is."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, see prctl(2)
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # it died before we asked
    torch.set_num_threads(1)


def _shared_empty(shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised uint8 tensor; in a worker, in shared memory, where it goes to the trainer without a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    count = int(np.prod(shape))
    if not count:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
