"""Figures of a data set: classes, image sizes and bytes, and a picture of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dattrain.data.decode import images
from dattrain.data.philox import Stream, words
from dattrain.data.source.dataset import NO_LABEL, BadSample, Dataset, locate
from dattrain.data.workers import Workers

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

    def lines(self) -> list[str]:
        """The figures as text."""
        present = self.histogram[self.histogram > 0]
        out = [
            f"samples      {self.samples:,} in {self.shards:,} shards",
            f"classes      {len(present):,} present, labels 0 to {len(self.histogram) - 1:,}"
            if len(present)
            else "classes      none: no sample has a label",
        ]
        if len(present):
            out.append(
                f"per class    {present.min():,} to {present.max():,}, median {np.median(present):,.0f}"
            )
        if self.unlabelled:
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


def measure(
    dataset: Dataset,
    *,
    limit: int | None = 20_000,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Stats:
    """Count the labels of the whole set, and read the headers of ``limit`` samples drawn at random (None: of all)."""
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

    def sizes(number: int) -> list[tuple[str, int, int, int]]:
        rows = []
        for item in items[number * _CHUNK : (number + 1) * _CHUNK].tolist():
            try:
                data = dataset.read(*locate(dataset, item)).data
                height, width = images.size(data)
                rows.append((images.sniff(data), height, width, len(data)))
            except (BadSample, images.BadImage):
                rows.append(("", 0, 0, 0))
        return rows

    workers = jobs if jobs > 1 else 0
    histogram, unlabelled, done = np.zeros(0, np.int64), 0, 0
    with Workers(labels, count=len(dataset.counts), workers=workers, in_order=False) as found:
        for part in found:
            counts = np.bincount(part[part != NO_LABEL])
            size = max(len(histogram), len(counts))
            histogram = np.pad(histogram, (0, size - len(histogram))) + np.pad(
                counts, (0, size - len(counts))
            )
            unlabelled += int((part == NO_LABEL).sum())
    rows: list[tuple[str, int, int, int]] = []
    with Workers(sizes, count=-(-len(items) // _CHUNK), workers=workers) as measured:
        for chunk in measured:
            rows += chunk
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
    )


def draw(stats: Stats, path: str | os.PathLike[str]) -> None:
    """A picture: samples per class (sorted), widths against heights, and bytes per image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 3)
    present = np.sort(stats.histogram[stats.histogram > 0])[::-1]
    axes[0].fill_between(np.arange(len(present)), present, step="mid")
    axes[0].set(
        xlabel="classes, by size", ylabel="samples", title=f"{len(present):,} classes", ylim=(0, None)
    )
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
