"""Checking shards and folders: every byte is read, every image and annotation decoded, and what is bad is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dattrain.data.annotations import instances
from dattrain.data.annotations.semantic import semantic_map
from dattrain.data.decode import images
from dattrain.data.prepare.object_figures import ObjectFigures
from dattrain.data.source import tar
from dattrain.data.source.dataset import NO_LABEL, BadSample, Dataset, Sample, ShardDataset
from dattrain.data.source.files import explained, open_file, sha256_of
from dattrain.data.source.index import LeftOut
from dattrain.data.source.shards import LocalSource, check_size, local_size
from dattrain.data.workers import Workers
from dattrain.errors import UserError

_CHUNK = 1024


@dataclass
class VerifyReport:
    """What was found.

    Attributes:
        samples: checked.
        nbytes: of images, decoded.
        bad: (key, reason) of samples that cannot be used.
        damaged: messages about whole shards.
        left_out: members of shards that no sample has.
        objects: figures of the objects of good samples.
    """

    samples: int = 0
    nbytes: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    objects: ObjectFigures = field(default_factory=ObjectFigures)

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        return not (self.bad or self.damaged or any(some.lost for some in self.left_out))


def verify(
    dataset: Dataset,
    *,
    jobs: int = 1,
    num_classes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """Check every sample of ``dataset``, in ``jobs`` processes; whatever is found, all others are checked too.

    Of a local shard, the size, the SHA-256 where its index has one, and the tar's own headers are compared with the
    index too. With ``num_classes``, labels and the classes of annotations must be below it.
    """
    report, counts = VerifyReport(), dataset.counts.tolist()
    # Of a shard of another size nothing can be counted on; its catalogue may claim any number of samples.
    whole = [shard for shard in range(len(counts)) if _right_size(dataset, shard, report.damaged)]
    tasks = [
        (shard, start, min(counts[shard], start + _CHUNK))
        for shard in whole
        for start in range(0, counts[shard], _CHUNK)
    ]
    total, done = sum(counts[shard] for shard in whole), 0
    with Workers(
        lambda i: _check(dataset, *tasks[i], num_classes), count=len(tasks), workers=jobs if jobs > 1 else 0
    ) as parts:
        for (_, start, end), part in zip(tasks, parts):
            report.samples += part.samples
            report.nbytes += part.nbytes
            report.bad += part.bad
            report.left_out += part.left_out
            report.objects += part.objects
            report.damaged += [message for message in part.damaged if message not in report.damaged]
            done += end - start
            progress(done, total)
    return report


def _right_size(dataset: Dataset, shard: int, damaged: list[str]) -> bool:
    """Whether a local shard has the size that its index says; else a message is added to ``damaged``."""
    if not isinstance(dataset, ShardDataset) or not isinstance(dataset.source, LocalSource):
        return True
    try:
        path = dataset.shards.paths[shard]
        check_size(path, local_size(path), int(dataset.shards.sizes[shard]))
    except UserError as error:
        damaged.append(str(error))
        return False
    return True


def _check(dataset: Dataset, shard: int, start: int, end: int, num_classes: int | None) -> VerifyReport:
    report = VerifyReport()
    if isinstance(dataset, ShardDataset):
        try:
            left_out = dataset.index(shard).left_out
            report.left_out += left_out if start == 0 else ()
            dataset.source.read(shard, 0, 1)  # opens it
        except UserError as error:
            report.damaged.append(str(error))
            return report
        if start == 0 and isinstance(dataset.source, LocalSource):
            try:
                _check_shard(dataset, shard)
            except UserError as error:
                report.damaged.append(str(error))
    for sample in range(start, end):
        report.samples += 1
        try:
            found = dataset.read(shard, sample)
            pixels = images.decode(found.data)
            if dataset.annotations != "none":
                size = pixels.shape[1], pixels.shape[2]
                report.objects += _check_annotation(dataset, found, size, num_classes)
            elif found.label == NO_LABEL:
                raise BadSample(f"{found.where}: has no label")
            if num_classes is not None and found.label >= num_classes:
                raise BadSample(f"{found.where}: label {found.label} is not below {num_classes}")
            report.nbytes += len(found.data)
        except images.BadImage as error:
            report.bad.append((found.key, f"{found.where}: {error}"))
        except (BadSample, UserError) as error:
            report.bad.append((dataset.key(shard, sample), str(error)))
    return report


def _check_annotation(
    dataset: Dataset, found: Sample, size: tuple[int, int], num_classes: int | None
) -> ObjectFigures:
    """Raise BadSample where an annotation does not fit its image of that height and width, or has a class that is not named.

    Returns:
        Figures of its objects; zeros for a map.
    """
    classes = len(dataset.classes) if dataset.classes is not None else num_classes
    numbers = None if classes is None else np.arange(min(classes, num_classes or classes), dtype=np.int64)
    if dataset.annotations == "maps":
        semantic_map(found.annotation, size, numbers, found.where)
        return ObjectFigures()
    return ObjectFigures.of(instances.check(found.annotation, size, numbers, found.where), size, found.key)


def _check_shard(dataset: ShardDataset, shard: int) -> None:
    """Compare the bytes of a local shard with its index. Raises UserError."""
    index = dataset.index(shard)
    path = dataset.shards.paths[shard]
    if index.sha256:
        with explained(path), open(open_file(path), "rb", buffering=0) as file:
            digest = sha256_of(file.fileno())
        if digest != index.sha256:
            raise UserError(
                f"{path}: its SHA-256 is not that of its index; bytes were changed: fetch or pack it anew"
            )
    there = {
        (tar.split_name(member.name)[0], member.offset, member.size)
        for member in tar.scan(path, unterminated=True)
        if member.readable
    }
    annotated = index.annotated
    for sample, place in enumerate(
        zip(annotated.offsets.tolist(), annotated.lengths.tolist()) if annotated else ()
    ):
        if place[0] and (index.key(sample), *place) not in there:
            raise UserError(
                f"{path}: has no annotation of {place[1]} bytes at offset {place[0]} for sample {index.key(sample)!r}, as its "
                "index says; index it anew with `dattrain data index --force`, or fetch it anew"
            )
    for sample, place in enumerate(zip(index.offsets.tolist(), index.lengths.tolist())):
        if place[0] and (index.key(sample), *place) not in there:
            raise UserError(
                f"{path}: has no image of {place[1]} bytes at offset {place[0]} for sample {index.key(sample)!r}, as its "
                "index says; index it anew with `dattrain data index --force`, or fetch it anew"
            )
