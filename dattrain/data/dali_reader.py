"""DALI's own ``readers.webdataset`` as a source of encoded samples, with a state that is refused where it does not fit.

A pipeline of its own reads; what it delivers goes through the same decoder and plan as everything else. DALI accepts a
checkpoint of another number of ranks or of other shards in silence and then reads a wrong order, so the state
carries what it belongs to. Each rank's epoch is padded with repeats up to whole batches: those have zero weight.
"""

from __future__ import annotations

import base64
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dattrain.config.schema import Config
from dattrain.data.augment.plan import draw
from dattrain.data.batch import Batch
from dattrain.data.feed import Encoded, Request, bad_sample_message
from dattrain.data.source.dataset import NO_LABEL, Dataset, ShardDataset
from dattrain.data.source.shards import LocalSource
from dattrain.errors import ConfigError, UserError

if TYPE_CHECKING:
    from dattrain.data.stream import Slots

log = logging.getLogger(__name__)

_BUFFER = 4096
"""Samples in DALI's shuffle buffer."""


class DaliReader:
    """Encoded micro-batches of one rank, in DALI's order.

    Args:
        config: the recipe.
        dataset: local, indexed shards.
        slots: positions of the rank's micro-batches.
        size: (height, width) of the network's input.
        states: of every rank, from a checkpoint; None at the start of a run.

    Raises:
        ConfigError: shards that are not local.
        UserError: no state for a run that is under way, or one that does not fit.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        slots: Slots,
        size: tuple[int, int],
        states: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        if not isinstance(dataset, ShardDataset) or not isinstance(dataset.source, LocalSource):
            raise ConfigError(
                f"data.reader=dali reads local tar shards; data.train={config.data.train} is remote or an image folder: "
                "use data.reader=index"
            )
        self.config = config
        self.dataset = dataset
        self.slots = slots
        self.size = size
        self.identity = self._identity()
        self._samples_of = [int(count) for count in dataset.counts]
        self._batches, self._checkpoint = self._restored(states)
        self._started = self._batches
        self._notes: dict[int, tuple[NDArray[np.bool_], str]] = {}
        self._shard_of = {os.path.abspath(path): i for i, path in enumerate(dataset.shards.paths)}
        self._folder = Path(tempfile.mkdtemp(prefix="dattrain-dali-"))
        try:
            self._pipeline = self._build()
        except BaseException:
            self.close()
            raise

    @property
    def samples_per_epoch(self) -> int:
        """Of all ranks, with the padding."""
        return self._batches_per_epoch * self.slots.micro_batch * self.slots.world

    @property
    def _batches_per_epoch(self) -> int:
        longest = -(-sum(self._samples_of) // self.slots.world)
        return -(-longest // self.slots.micro_batch)

    def read(self, number: int) -> Encoded:
        """The next micro-batch; ``number`` counts from 0, and calls come in its order.

        Raises:
            UserError: a sample without image or label, without ``on_bad: skip``; a label that does not fit.
        """
        (output,) = self._pipeline.run()
        checkpoint = base64.b64encode(self._pipeline.checkpoint()).decode()
        epoch, batch = divmod(self._started + number, self._batches_per_epoch)
        start = batch * self.slots.micro_batch
        padding = np.arange(start, start + self.slots.micro_batch) >= self._share(epoch)
        self._notes[number] = padding, checkpoint
        positions = self.slots.positions(number)
        n = len(positions)
        shards, samples = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        content: list[bytes | None] = [None] * n
        labels, keys, where, bad = np.zeros(n, dtype=np.int64), [""] * n, [""] * n, {}
        for i in range(n):
            shard, sample = self._place(output[i].source_info())
            shards[i], samples[i] = shard, sample
            keys[i], label = self.dataset.key(shard, sample), self.dataset.label(shard, sample)
            offset = int(self.dataset.index(shard).offsets[sample])
            where[i] = (
                f"{self.dataset.shards.paths[shard]}: sample {keys[i].partition(':')[2]!r} at offset {offset}"
            )
            if label >= self.config.model.num_classes:
                raise UserError(
                    f"{where[i]}: label {label}, but model.num_classes={self.config.model.num_classes}; "
                    "the data set and the head do not fit"
                )
            content[i] = np.asarray(output[i]).tobytes()
            if label == NO_LABEL or not content[i]:
                content[i] = None
                bad[i] = f"{where[i]}: " + (
                    "has no label" if label == NO_LABEL else "the image has zero bytes"
                )
                if self.config.data.on_bad != "skip":
                    raise UserError(bad_sample_message(bad[i]))
            else:
                labels[i] = label
        plan = draw(self.config.augment, self.config.train.seed, positions, self.size)
        return Encoded(Request(positions, shards, samples, plan), content, labels, keys, where, bad)

    def after(self, number: int, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        """The batch without the weight of its padding, and the state after it."""
        from dattrain.data.stream import unweighted

        padding, checkpoint = self._notes.pop(number)
        state = {**self.identity, "batches": self._started + number + 1, "checkpoint": checkpoint}
        return unweighted(batch, padding), state

    def close(self) -> None:
        """Let go of the pipeline and its index files."""
        self._pipeline = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _share(self, epoch: int) -> int:
        """Samples of this rank in an epoch: ranks move on by one part of the set after each."""
        total, world = sum(self._samples_of), self.slots.world
        part = (self.slots.rank + epoch) % world
        return total * (part + 1) // world - total * part // world

    def _place(self, info: str) -> tuple[int, int]:
        """Shard and sample of ``path:offset:member``; members are called by number in the index that DALI was given."""
        path, _, member = info.rsplit(":", 2)
        return self._shard_of[os.path.abspath(path)], int(member.partition(".")[0])

    def _identity(self) -> dict[str, Any]:
        import nvidia.dali

        shards = self.dataset.shards
        names = [
            f"{os.path.basename(path)} {samples} {size}"
            for path, samples, size in zip(shards.paths, shards.samples, shards.sizes)
        ]
        return {
            "reader": "dali",
            "dali": nvidia.dali.__version__,
            "shards": sha256("\n".join(names).encode()).hexdigest()[:16],
            "world": self.slots.world,
            "micro_batch": self.slots.micro_batch,
            "seed": self.config.train.seed,
            "shuffle": self.config.data.shuffle,
        }

    def _restored(self, states: Sequence[Mapping[str, Any]] | None) -> tuple[int, bytes | None]:
        """Batches read before, and DALI's checkpoint."""
        if not states:
            if self.slots.samples_seen:
                raise UserError(
                    f"data.reader=dali cannot go on at sample {self.slots.samples_seen} without the state that its own "
                    "checkpoints hold; this run was begun with another data.reader"
                )
            return 0, None
        for rank, state in enumerate(states):
            for key, mine in self.identity.items():
                if state.get(key) != mine:
                    raise UserError(
                        f"data.reader=dali: the checkpoint's state of rank {rank} is for {key}={state.get(key)}, this run "
                        f"has {key}={mine}; DALI would read a wrong order. Resume with the same number of ranks, shards, "
                        "micro-batch and DALI version, or train with data.reader=index, which is exact anywhere"
                    )
        if len(states) != self.slots.world:
            raise UserError(
                f"data.reader=dali: the checkpoint has the state of {len(states)} ranks, not {self.slots.world}"
            )
        mine = states[self.slots.rank]
        return int(mine["batches"]), base64.b64decode(mine["checkpoint"])

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn

        paths = list(self.dataset.shards.paths)
        index_paths = [self._index_file(shard) for shard in range(len(paths))]
        pipeline = Pipeline(
            batch_size=self.slots.micro_batch,
            num_threads=1,
            device_id=None,
            prefetch_queue_depth=1,
            seed=(self.config.train.seed * 1_000_003 + 1) % 2**31,
            enable_checkpointing=True,
            checkpoint=self._checkpoint,
        )
        with pipeline:
            files = fn.readers.webdataset(
                paths=paths,
                index_paths=index_paths,
                ext=["jpg"],
                shard_id=self.slots.rank,
                num_shards=self.slots.world,
                random_shuffle=self.config.data.shuffle,
                initial_fill=_BUFFER,
                pad_last_batch=True,
                name="reader",
            )
            pipeline.set_outputs(files[0] if isinstance(files, (list, tuple)) else files)
        pipeline.build()
        return pipeline

    def _index_file(self, shard: int) -> str:
        """DALI's index of a shard, made from ours: it names the images alone, labels come from our index."""
        index = self.dataset.index(shard)
        if (index.offsets == 0).any():
            raise UserError(
                f"{self.dataset.shards.paths[shard]}: has samples without image, which data.reader=dali cannot pass by; "
                "use data.reader=index"
            )
        path = self._folder / f"{shard}.idx"
        lines = [f"v1.2 {len(index)}"]
        # Whatever its format, DALI shall take it for this one component.
        lines += [f"jpg {o} {n} {i}.jpg" for i, (o, n) in enumerate(zip(index.offsets, index.lengths))]
        path.write_text("\n".join(lines) + "\n")
        return str(path)
