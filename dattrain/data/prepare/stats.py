"""Figures of a data set: classes, image sizes and bytes, and a picture of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations import instances, maps
from dattrain.data.annotations.instances import BACKGROUND
from dattrain.data.decode import images
from dattrain.data.philox import Stream, words
from dattrain.data.prepare.object_figures import ObjectFigures
from dattrain.data.source.annotation_index import Annotations
from dattrain.data.source.dataset import NO_LABEL, BadSample, Dataset, Sample, locate
from dattrain.data.workers import Workers
from dattrain.files import counted

_CHUNK = 256


@dataclass(frozen=True)
class Stats:
    """Figures of a set.

    Attributes:
        samples, shards: of the whole set.
        histogram: samples per label, of the whole set: int64, from label 0 on.
        unlabelled: samples without label.
        measured: samples whose headers were read.
        heights, widths, nbytes: of those, int64 each.
        kinds: how many of those are ``jpeg``, ``png``, ...
        unreadable: how many of those have no readable header.
        annotations: what is beside the images.
        classes: names of the classes of pixels or objects, where they are known.
        per_class: pixels or objects of each class in those samples: int64.
        images_per_class: how many of those samples have it: int64.
        void: pixels of no class in those, in maps; crowds, of objects.
        objects: more of those.
    """

    samples: int
    shards: int
    histogram: NDArray[np.int64]
    unlabelled: int
    measured: int
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    kinds: dict[str, int]
    unreadable: int
    annotations: Annotations = "none"
    classes: Sequence[str] = ()
    per_class: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    images_per_class: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    void: int = 0
    objects: ObjectFigures = field(default_factory=ObjectFigures)

    def lines(self) -> list[str]:
        """The figures as text."""
        present = self.histogram[self.histogram > 0]
        out = [
            f"samples      {self.samples:,} in {counted(self.shards, 'shard')}",
            f"classes      {len(present):,} present, labels 0 to {len(self.histogram) - 1:,}"
            if len(present)
            else "classes      none: no sample has a label",
        ]
        if self.annotations != "none":
            out[1:] = self._annotation_lines()
        if len(present):
            out.append(
                f"per class    {present.min():,} to {present.max():,}, median {np.median(present):,.0f}"
            )
        if self.unlabelled and self.annotations == "none":
            out.append(f"no label     {self.unlabelled:,}")
        if len(self.heights):
            out += [
                f"measured     {self.measured:,} headers: "
                + ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items()))
                + (f", {self.unreadable:,} unreadable" if self.unreadable else ""),
                f"width        {_quantiles(self.widths)}",
                f"height       {_quantiles(self.heights)}",
                f"bytes        {_quantiles(self.nbytes)}",
            ]
        return out

    def _annotation_lines(self) -> list[str]:
        """What the annotations of the measured samples hold."""
        maps = self.annotations == "maps"
        what, other = ("pixels", "void") if maps else ("objects", "crowds")
        total = int(self.per_class.sum())
        whole = total + self.void if maps else total
        names = [*self.classes, *(str(i) for i in range(len(self.classes), len(self.per_class)))]
        # Of named objects, class 0 is what is left; numbers without names may begin there.
        first = int(not maps and not self.per_class[:1].any())
        out = [
            f"classes      {int((self.per_class > 0).sum()):,} of {max(0, len(names) - first):,} present, in {self.annotations}",
            f"{what:<12} {total:,} in {counted(self.measured, 'image')}, {self.void:,} {other}"
            + (f" ({self.void / max(1, whole):.1%})" if whole else ""),
        ]
        for i in range(first, len(names)):
            count, images = (
                int(row[i]) if i < len(row) else 0 for row in (self.per_class, self.images_per_class)
            )
            out.append(f"  {names[i]:<20} {count:>14,} {count / max(1, total):>7.2%} {images:>9,} images")
        if self.annotations == "instances" and not first and list(self.classes[:1]) == [BACKGROUND]:
            out.append(
                f"odd          {counted(int(self.per_class[0]), 'object')} of the {BACKGROUND}: bad samples in detection"
            )
        if self.objects.images:
            out += self.objects.sizes() + [f"odd          {line}" for line in self.objects.oddities()]
        return out


def measure(
    dataset: Dataset,
    *,
    limit: int | None = 20_000,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Stats:
    """Count the labels of the whole set, and read the headers of ``limit`` samples drawn at random (None: of all).

    Of those, annotations are counted too.
    """
    total = int(dataset.counts.sum())
    items = np.arange(total, dtype=np.int64)
    if limit is not None and limit < total:
        # The smallest of random keys, drawn in pieces: no permutation of the whole set is held.
        keys = np.concatenate(
            [words(0, Stream.PACK, items[i : i + (1 << 18)], 1)[:, 0] for i in range(0, total, 1 << 18)]
        )
        items = np.sort(np.argpartition(keys, limit)[:limit])

    def labels(shard: int) -> NDArray[np.int64]:
        return np.asarray([dataset.label(shard, i) for i in range(dataset.counts[shard])], dtype=np.int64)

    def sizes(
        number: int,
    ) -> tuple[list[tuple[str, int, int, int]], list[NDArray[np.int64]], ObjectFigures]:
        rows, contents, objects = [], [], ObjectFigures()
        for item in items[number * _CHUNK : (number + 1) * _CHUNK].tolist():
            try:
                sample = dataset.read(*locate(dataset, item))
                data = sample.data
                height, width = images.size(data)
                if dataset.annotations == "maps":
                    contents.append(_pixels(sample))
                elif dataset.annotations == "instances":
                    found = instances.parse(sample.annotation, sample.where)
                    whole = np.asarray([not why for why in found.degenerate((height, width))], dtype=np.bool_)
                    crowds, counts = [int((found.crowd & whole).sum())], np.bincount(found.classes[whole])
                    contents.append(np.concatenate((crowds, counts)).astype(np.int64))
                    objects += ObjectFigures.of(found, (height, width), sample.key)
                rows.append((images.sniff(data), height, width, len(data)))
            except (BadSample, images.BadImage):
                rows.append(("", 0, 0, 0))
        return rows, contents, objects

    workers = jobs if jobs > 1 else 0
    histogram, unlabelled, done = np.zeros(0, np.int64), 0, 0
    with Workers(labels, count=len(dataset.counts), workers=workers, in_order=False) as found:
        for part in found:
            counts = np.bincount(part[part != NO_LABEL])
            histogram = _added(histogram, counts)
            unlabelled += int((part == NO_LABEL).sum())
    rows: list[tuple[str, int, int, int]] = []
    per_class, images_per_class, void = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    objects = ObjectFigures()
    with Workers(sizes, count=-(-len(items) // _CHUNK), workers=workers) as measured:
        for chunk, contents, figures in measured:
            rows += chunk
            objects += figures
            for counts in contents:
                void += int(counts[0])
                per_class = _added(per_class, counts[1:])
                images_per_class = _added(images_per_class, (counts[1:] > 0).astype(np.int64))
            done += len(chunk)
            progress(done, len(items))
    good = [row for row in rows if row[0]]
    table = np.asarray([row[1:] for row in good], dtype=np.int64).reshape(-1, 3)
    return Stats(
        samples=total,
        shards=len(dataset.counts),
        histogram=histogram,
        unlabelled=unlabelled,
        measured=len(rows),
        heights=table[:, 0],
        widths=table[:, 1],
        nbytes=table[:, 2],
        kinds=Counter(kind for kind, *_ in good),
        unreadable=len(rows) - len(good),
        annotations=dataset.annotations,
        classes=dataset.classes or (),
        per_class=per_class,
        images_per_class=images_per_class,
        void=void,
        objects=objects,
    )


def _pixels(sample: Sample) -> NDArray[np.int64]:
    """Pixels of each class, after those that are void. Raises BadSample."""
    counts = np.bincount(maps.read(sample.annotation, sample.where).ravel(), minlength=maps.VOID + 1)
    void, counts = counts[maps.VOID :], np.trim_zeros(counts[: maps.VOID], "b")
    return np.concatenate((void, counts)).astype(np.int64)


def _added(one: NDArray[np.int64], two: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of two counts by class, of which either may be longer."""
    size = max(len(one), len(two))
    return np.pad(one, (0, size - len(one))) + np.pad(two, (0, size - len(two)))


def draw(stats: Stats, path: str | os.PathLike[str]) -> None:
    """A picture: samples per class (sorted), widths against heights, and bytes per image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 3)
    counts = stats.histogram if stats.annotations == "none" else stats.per_class
    present = np.sort(counts[counts > 0])[::-1]
    what = {"maps": "pixels", "instances": "objects"}.get(stats.annotations, "samples")
    axes[0].fill_between(np.arange(len(present)), present, step="mid")
    axes[0].set(xlabel="classes, by size", ylabel=what, title=f"{len(present):,} classes", ylim=(0, None))
    axes[1].hist2d(stats.widths, stats.heights, bins=60, cmin=1)
    axes[1].set(xlabel="width", ylabel="height", title=f"pixels of {len(stats.widths):,} images")
    axes[2].hist(stats.nbytes / 1024, bins=60)
    axes[2].set(xlabel="KiB", ylabel="images", title="encoded size")
    figure.savefig(path, dpi=110)


def _quantiles(values: NDArray[np.int64]) -> str:
    low, median, high = np.quantile(values, (0.05, 0.5, 0.95))
    return (
        f"{values.min():,} to {values.max():,}, mean {values.mean():,.0f}, "
        f"5%/50%/95% {low:,.0f}/{median:,.0f}/{high:,.0f}"
    )
