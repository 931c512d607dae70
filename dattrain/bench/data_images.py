"""The images that ``dattrain bench data`` measures on: the same files as an image folder and as shards."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from dattrain.bench.jpegs import write_folder
from dattrain.data.decode import images as formats
from dattrain.data.prepare.pack import pack
from dattrain.data.prepare.write_shard import PackOptions
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import UserError

_SHARD = 256


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


def prepare(made: Path, *, folder: Path | None, shards: str | None, count: int, batch: int) -> Images:
    """The images as a folder and as shards; what is missing is made in ``made``.

    Raises:
        UserError: fewer images than asked for.
    """
    given, made_here = shards is not None, folder is None and shards is None
    if made_here:
        folder = made / "images"
        print(f"making {count} JPEGs ...", flush=True)
        write_folder(folder, count)
    if shards is None:
        pack(open_dataset(str(folder)), made / "shards", PackOptions(per_shard=_SHARD, check=False))
        shards = str(made / "shards")
    dataset = open_dataset(shards)
    count = min(count, int(dataset.counts.sum()))
    if count < batch * 2:
        raise UserError(f"{shards or folder}: {count} images are too few for batches of {batch}")
    places = list(itertools.islice(((s, i) for s, n in enumerate(dataset.counts) for i in range(n)), count))
    sizes, total = [], 0
    for k, (shard, sample) in enumerate(places):
        found = dataset.read(shard, sample)
        total += len(found.data)
        sizes.append(formats.size(found.data))
        if given:
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
        made=made_here,
    )
