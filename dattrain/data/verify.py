"""Checking shards and folders: every byte is read, every image decoded, and what is bad is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

from dattrain.data import images, tar
from dattrain.data.dataset import NO_LABEL, BadSample, Dataset, ShardDataset
from dattrain.data.indexing import split_name
from dattrain.data.shards import LocalSource
from dattrain.data.workers import Workers
from dattrain.errors import UserError

_CHUNK = 1024


@dataclass
class Report:
    """What was found.

    Attributes:
        samples: checked.
        nbytes: of images, decoded.
        bad: (key, reason) of samples that cannot be used.
        damaged: messages about whole shards.
    """

    samples: int = 0
    nbytes: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        return not (self.bad or self.damaged)


def verify(
    dataset: Dataset,
    *,
    jobs: int = 1,
    num_classes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Check every sample of ``dataset``, in ``jobs`` processes.

    Of a local shard, the size, the SHA-256 where its index has one, and the tar's own headers are compared with the
    index too. With ``num_classes``, labels must be below it.
    """
    tasks = [
        (shard, start, min(count, start + _CHUNK))
        for shard, count in enumerate(dataset.counts.tolist())
        for start in range(0, count, _CHUNK)
    ]
    total, report = int(dataset.counts.sum()), Report()
    done = 0
    with Workers(
        lambda i: _check(dataset, *tasks[i], num_classes), count=len(tasks), workers=jobs if jobs > 1 else 0
    ) as parts:
        for (_, start, end), part in zip(tasks, parts):
            report.samples += part.samples
            report.nbytes += part.nbytes
            report.bad += part.bad
            report.damaged += [message for message in part.damaged if message not in report.damaged]
            done += end - start
            progress(done, total)
    return report


def _check(dataset: Dataset, shard: int, start: int, end: int, num_classes: int | None) -> Report:
    report = Report()
    try:
        if start == 0 and isinstance(dataset, ShardDataset):
            _check_shard(dataset, shard)
        for sample in range(start, end):
            report.samples += 1
            try:
                found = dataset.read(shard, sample)
                images.decode(found.data)
                if found.label == NO_LABEL:
                    raise BadSample(f"{found.where}: has no label")
                if num_classes is not None and found.label >= num_classes:
                    raise BadSample(f"{found.where}: label {found.label} is not below {num_classes}")
                report.nbytes += len(found.data)
            except images.BadImage as error:
                report.bad.append((found.key, f"{found.where}: {error}"))
            except BadSample as error:
                report.bad.append((dataset.key(shard, sample), str(error)))
    except UserError as error:
        report.damaged.append(str(error))
    return report


def _check_shard(dataset: ShardDataset, shard: int) -> None:
    """Compare a shard as a whole with its index. Raises UserError."""
    index = dataset.index(shard)
    path = dataset.shards.paths[shard]
    dataset.source.read(shard, 0, tar.BLOCK)  # opens it, and so checks its size
    if not isinstance(dataset.source, LocalSource):
        return
    if index.sha256:
        digest = sha256()
        with open(path, "rb", buffering=0) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != index.sha256:
            raise UserError(
                f"{path}: its SHA-256 is not that of its index; bytes were changed: fetch or pack it anew"
            )
    offsets = {offset: i for i, offset in enumerate(index.offsets.tolist())}
    found = 0
    for member in tar.scan(path, unterminated=True):
        sample = offsets.get(member.offset)
        if sample is not None:
            found += 1
            if split_name(member.name)[0] != index.key(sample) or member.size != index.lengths[sample]:
                raise UserError(
                    f"{path}: member {os.path.basename(member.name)!r} is not what its index says"
                )
    if found != int((index.offsets > 0).sum()):
        raise UserError(f"{path}: {found} of the {len(index)} images of its index are in the tar")
