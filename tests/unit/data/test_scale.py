"""A set of ImageNet-22K's size: 8,192 shards, 14.2 million samples. What is not read is sparse, but of full size."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from dattrain.data.order import Order
from dattrain.data.source import tar
from dattrain.data.source.index import CatalogueEntry, ShardIndex, index_path, write_catalogue

SHARDS, SAMPLES, CLASSES = 8192, 14_200_000, 21_841
LANES, WORLD, RANK, BATCH = 64, 256, 37, 4096

MEASURE = """
    import os, sys, time, torch
    from dattrain.config.schema import Config
    from dattrain.data.decode import images
    from dattrain.data.factory import train_loader

    def resident():  # proportional set size of this process and its workers, MiB
        total, me = 0, os.getpid()
        for pid in [me, *map(int, open(f"/proc/{me}/task/{me}/children").read().split())]:
            total += next(int(l.split()[1]) for l in open(f"/proc/{pid}/smaps_rollup") if l.startswith("Pss:"))
        return total / 1024

    folder, seen, lanes, world, rank, batch = sys.argv[1], *map(int, sys.argv[2:])
    config = Config.model_validate({
        "model": {"num_classes": 21841},
        "data": {"train": folder, "workers": 2, "lanes": lanes},
        "train": {"global_batch": batch, "micro_batch": 16},
    })
    images.decode(open(folder + "/photo.jpg", "rb").read())
    before, start = resident(), time.perf_counter()
    loader = train_loader(config, rank=rank, world=world, samples_seen=seen, device=torch.device("cpu"), img_size=224)
    first = next(loader)
    seconds = time.perf_counter() - start
    assert first.images.any() and len(loader.skipped.samples) == 0
    print(seconds, resident() - before, loader.samples_per_epoch)
    loader.close()
"""


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["needed", "all"]
)
def simulated(request, tmp_path_factory, photo) -> tuple[Path, Order, list[int]]:
    """The set, its order, and positions from where it can be read: the start and the middle of an epoch.

    Indexes and bytes are written for the samples that one rank reads there; in the long matrix, indexes for all.
    """
    from pictures import encode

    folder = tmp_path_factory.mktemp("in22k")
    data = encode(photo.crop((6, 100, 506, 475)))
    (folder / "photo.jpg").write_bytes(data)
    counts = np.full(SHARDS, SAMPLES // SHARDS)
    counts[: SAMPLES % SHARDS] += 1
    stride = 512 + -(-len(data) // 512) * 512 + 2 * 1024  # image, and .cls and .json of one block each
    names = [f"imagenet22k-train-{k:04d}.tar" for k in range(SHARDS)]
    for name, count in zip(names, counts.tolist()):
        with open(folder / name, "wb") as file:
            file.truncate(count * stride + 1024)
        Path(index_path(str(folder / name))).touch()
    write_catalogue(
        folder,
        {
            n: CatalogueEntry(c, c * stride + 1024, "0" * 64, CLASSES - 1)
            for n, c in zip(names, counts.tolist())
        },
    )
    order = Order(counts, seed=0, lanes=LANES)
    starts = [0, SAMPLES // 2 // BATCH * BATCH]
    needed: set[tuple[int, int]] = set()
    for start in starts:
        for step in range(8):
            at = order.rank_positions(start + step * BATCH, BATCH, RANK, WORLD)
            needed |= set(zip(*(x.tolist() for x in order.locate(at))))
    rng = np.random.default_rng(0)
    for shard in range(SHARDS) if request.param else sorted({s for s, _ in needed}):
        count = int(counts[shard])
        labels = rng.integers(0, CLASSES, count)
        keys = [f"n{label + 10**7:08d}_{i}" for i, label in enumerate(labels.tolist())]
        offsets = np.arange(count) * stride + 512
        index = ShardIndex.build(
            offsets, np.full(count, len(data)), labels, keys, size=count * stride + 1024, sha256="0" * 64
        )
        Path(index_path(str(folder / names[shard]))).write_bytes(index.to_bytes())
        with open(folder / names[shard], "r+b") as file:
            for sample in (i for s, i in needed if s == shard):
                file.seek(int(offsets[sample]) - 512)
                file.write(tar.header(f"{keys[sample]}.jpg", len(data)) + data)
    return folder, order, starts


def test_starting_and_resuming_is_small(simulated, record_property):
    folder, _, starts = simulated
    for seen in starts:
        arguments = [str(folder), *map(str, (seen, LANES, WORLD, RANK, BATCH))]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEASURE), *arguments],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        seconds, mib, samples = map(float, done.stdout.split())
        record_property(f"first batch at {seen}", f"{seconds:.2f} s, {mib:.0f} MiB above the imports")
        print(f"first batch at {seen}: {seconds:.2f} s, {mib:.0f} MiB above the imports")
        assert samples == SAMPLES and mib < 500


def test_a_rank_opens_few_shards(simulated):
    """256 ranks share 64 lanes: a rank keeps to one lane, so to the shards of one window at a time."""
    _, order, starts = simulated
    for seen in starts:
        positions = order.rank_positions(seen, BATCH, RANK, WORLD)
        assert len(set(order.lane(positions).tolist())) == 1
        ahead = order.shards_to_prefetch(seen, BATCH, RANK, WORLD)
        assert len(ahead) <= 2 * (4 + 2)
