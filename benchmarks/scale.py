"""What grows with the number of ranks, and how, without a GPU: ``python -m benchmarks.scale [--worlds N ...] [PART ...]``.

The product's code runs for every rank, one after another in this process (``tests/many_ranks.py``), or as far as it talks to others in a
thread for each rank (``tests/counting_store.py``); its calls of the operating system, and of the store, are counted. What a
process cannot hold is computed, by formulas that are checked against what was counted, and marked so.

Parts: ``checkpoints``, ``order``, ``start``, ``status``, ``rendezvous``, ``agreement``. Prints a table of Markdown for each; seconds are of
CPU.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import scale_network
from benchmarks.resume import shapes
from dattrain.config.data_sections import Augment
from dattrain.data.feed import RankShare, TrainFeed
from dattrain.data.order import Order
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.index import CatalogueEntry, index_path, write_catalogue
from dattrain.files import readable_size
from dattrain.state.format import checkpoint, retention
from dattrain.state.format.manifest import MANIFEST, Manifest, read_manifest
from dattrain.submit import history, run_status
from dattrain.submit.queue import JobState
from tests.many_ranks import Count, Group, counted, save, write

WORLDS = (64, 256, 1024, 4096)
RANKS_OF_A_NODE = 8
STAGE = 2
SHARDS, SAMPLES, CLASSES, LANES = 8192, 14_200_000, 21_841, 64
"""ImageNet-22K as it is packed by default; lanes as by default."""
PER_RANK = 16
"""Images of a rank in each update."""
Row = dict[str, Any]


def checkpoints(world: int, folder: Path) -> Row:
    """A resume, a save, a verification and a prune of DAT-B with 21,841 classes."""
    named = shapes()
    old = write(folder, named, world, STAGE)
    some = sorted({0, world // 2, world - 1})
    counts, received, _ = Group(folder, named, world, STAGE).resume(some)
    others = range(1, world)
    row: Row = {
        "resume: opens, rank 0": counts[0].opens,
        "resume: opens, another": max(counts[r].opens for r in others),
        "resume: sizes asked, rank 0": counts[0].stats,
        "resume: sizes asked, all others": sum(counts[r].stats for r in others),
        "resume: bytes read by all, of the checkpoint's": f"{sum(c.nbytes for c in counts) / _size(old):.2f}",
        "resume: s, rank 0": received[0].cpu,
        "resume: s, another": max(received[r].cpu for r in some[1:]),
    }
    counts = save(folder, named, world, STAGE, retention.Policy(keep_last=2))
    first, rest = counts[0], counts[1:]
    new = folder / "checkpoints" / checkpoint.folder_name(8)
    manifest = read_manifest(new)
    digests = manifest.files.values()
    row |= {
        "checkpoint: bytes": _bytes(_size(new)),
        "checkpoint: headers of its files": _bytes(sum(d.header for d in digests)),
        "save: written by another": _bytes(max(c.written for c in rest)),
        "save: opens to write, another": max(c.writes for c in rest),
        "save: fsyncs + renames, another": max(c.synced + c.renamed for c in rest),
        "save: opens + sizes asked of other files, another": max(c.opens + c.stats for c in rest),
        "save: opens to read, rank 0 (markers)": first.opens,
        "save: looks for a file, rank 0": first.looked,
        "save: removes, rank 0 (markers)": first.removed,
        "save: sizes asked, rank 0 (2 checkpoints kept)": first.stats,
        "save: fsyncs + renames, rank 0": first.synced + first.renamed,
        "save: s, rank 0": first.cpu,
        "save: s, another": sorted(c.cpu for c in rest)[len(rest) // 2],
    }
    text = (new / MANIFEST).read_bytes()
    row |= {
        "manifest: bytes": _bytes(len(text)),
        "manifest: s to render": _seconds(manifest.render),
        "manifest: s to parse": _seconds(lambda: Manifest.parse(text)),
        "manifest: bytes sent to each rank": _bytes(len(pickle.dumps(manifest))),
    }
    with counted() as count:
        checkpoint.verify(new)
    row |= {
        "verify: opens": count.opens,
        "verify: sizes asked": count.stats,
        "verify: bytes read, of the checkpoint's": f"{count.nbytes / _size(new):.2f}",
        "verify: s": count.cpu,
    }
    with counted() as count:
        retention.prune(folder / "checkpoints", retention.Policy(keep_last=1))
    return row | {
        "prune of one of two: opens of files": sum(name == MANIFEST for name in count.names),
        "prune of one of two: sizes asked": count.stats,
        "prune of one of two: removes": count.removed,
        "prune of one of two: s": count.cpu,
    }


def order(world: int, folder: Path) -> Row:
    """The order of 14.2 M samples, and the samples of one rank's micro-batch."""
    counts = np.full(SHARDS, SAMPLES // SHARDS)
    counts[: SAMPLES % SHARDS] += 1
    known = Order(counts, seed=0, lanes=LANES)
    share = RankShare(PER_RANK * world, PER_RANK, world // 2, world, 0)
    feed = TrainFeed(known, Augment(), 0, (224, 224), share)
    first = _seconds(lambda: feed.request(0), times=1)
    tracemalloc.start()
    feed.request(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # One window of every lane: which node reads which shard.
    updates = max(1, known.window_samples * known.lanes // share.global_batch)
    readers: set[tuple[int, int]] = set()
    node = np.arange(share.global_batch) // (PER_RANK * RANKS_OF_A_NODE)
    for update in range(updates):
        shards, _ = known.locate(known.batch_positions(update * share.global_batch, share.global_batch))
        readers.update(zip(node.tolist(), shards.tolist()))
    return {
        "global batch": share.global_batch,
        "tables of two epochs, bytes": _bytes(sum(t.nbytes for t in known._epoch(0)) * 2),
        "first micro-batch of an epoch: s": first,
        "a micro-batch: s": _seconds(lambda: feed.request(2)),
        "a micro-batch: memory": _bytes(peak),
        "shards that a rank is told to read ahead": len(
            known.shards_to_prefetch(0, share.global_batch, share.rank, world)
        ),
        "nodes that read a shard in an epoch, mean": f"{len(readers) / len({s for _, s in readers}):.1f}",
    }


def start(world: int, folder: Path) -> Row:
    """What each rank opens before its first update; the same for any number of them."""
    modules, count = _of_one_rank()
    return {
        "modules: opens of files, a rank": modules,
        "modules: opens of files, all": modules * world,
        "set of 8,192 shards: opens, a rank": count.opens,
        "set of 8,192 shards: read, a rank": _bytes(count.nbytes),
        "set of 8,192 shards: listings of its folder, a rank": count.listed,
        "set of 8,192 shards: s, a rank": count.cpu,
        "set of 8,192 shards: read, all": _bytes(count.nbytes * world),
    }


_IMPORTS = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and isinstance(args[0], str) else None)
import dattrain.engine.train
from dattrain.engine import zero
import torch
zero.import_deepspeed(torch.device("cpu"))
print(len(opened))
"""


@cache
def _of_one_rank() -> tuple[int, Count]:
    done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True)
    names = [f"imagenet22k-train-{k:04d}.tar" for k in range(SHARDS)]
    count = SAMPLES // SHARDS
    with _folder(None) as folder:
        for name in names:
            (folder / name).touch()
            Path(index_path(str(folder / name))).touch()
        entry = CatalogueEntry(count, count * 110_000, "0" * 64, CLASSES - 1)
        write_catalogue(folder, dict.fromkeys(names, entry))
        with counted() as found:
            assert len(open_dataset(str(folder)).counts) == SHARDS
    return int(done.stdout.split()[-1]), found


def status(world: int, folder: Path) -> Row:
    """``dattrain status`` of a run of so many ranks, and what is written down when all of them crash."""
    (folder / "logs").mkdir()
    for rank in range(world):
        (folder / "logs" / f"rank_{rank}.log").write_text("x" * 1000)
    nodes = [f"gpu{n:05d}" for n in range(world // RANKS_OF_A_NODE)]
    (folder / "submit").mkdir()
    spec = {"folder": str(folder / "submit" / "slurm"), "time_s": 1e6, "signal_delay_s": 60, "retries": 3}
    (folder / "submit" / "spec.json").write_text(json.dumps(spec))
    history.record(folder, "submit", job="1", by="user")
    begun = history.record(folder, "begin", job="1", restart=0, nodes=nodes, checkpoint=None)
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 6.9, "images_per_s": 1e5}\n' * 5000)
    write(folder, {"w": (world,)}, world, STAGE)
    with counted() as count:
        found = run_status.status_of(folder, {"1": JobState("RUNNING", nodes="gpu[00000-00511]")})
    assert (found.state, found.checkpoint) == ("running", 7)
    attempt = history.attempt_folder(folder, "1", 0)
    attempt.mkdir(parents=True)
    for rank in range(world):
        report = {"rank": rank, "node": nodes[rank // RANKS_OF_A_NODE], "error": "x" * 200, "time": rank}
        (attempt / f"rank_{rank:05d}.json").write_text(json.dumps(report))
    with counted() as crash:
        history.record_end(
            folder, spec, begun, status=1, slurm_state=None, stderr="", last_error=lambda rank: "", may_exclude=True
        )  # fmt: skip
    return {
        "status: opens": count.opens,
        "status: looks and sizes asked": count.looked + count.stats,
        "status: read": _bytes(count.nbytes),
        "status: s": count.cpu,
        "a crash of all ranks, read by the job hook: opens": crash.opens,
        "a crash of all ranks: s": crash.cpu,
        "files in logs/ and of submitit": 3 * world,
    }


PARTS: dict[str, Callable[[int, Path], Row]] = {
    "checkpoints": checkpoints,
    "order": order,
    "start": start,
    "status": status,
    "rendezvous": scale_network.rendezvous,
    "agreement": scale_network.agreement,
}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _bytes(count: float) -> str:
    return readable_size(count)


def _seconds(action: Callable[[], object], times: int = 5) -> float:
    """Median CPU seconds."""
    found = []
    for _ in range(times):
        begin = time.process_time()
        action()
        found.append(time.process_time() - begin)
    return sorted(found)[len(found) // 2]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: dict[int, Row]) -> str:
    """Markdown: a line for each quantity, a column for each number of ranks."""
    lines = ["| | " + " | ".join(f"{world:,}" for world in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in next(iter(rows.values())):
        lines.append(f"| {name} | " + " | ".join(_text(row[name]) for row in rows.values()) + " |")
    return "\n".join(lines)


@contextmanager
def _folder(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Measure what is asked for; a table for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--worlds", nargs="+", type=int, default=WORLDS, metavar="N", help="numbers of ranks")
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for part in args.parts or PARTS:
        rows: dict[int, Row] = {}
        begin = time.monotonic()
        for world in args.worlds:
            with _folder(args.dir) as folder:
                rows[world] = PARTS[part](world, folder)
        print(f"## {part}\n\n{table(rows)}\n", flush=True)
        print(f"{part}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
