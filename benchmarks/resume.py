"""What a resume by many ranks opens and reads, counted: ``python -m benchmarks.resume``.

Writes checkpoints of DAT-B with 21,841 classes as so many ranks would (real headers and manifests, zeros for tensors, in sparse
files), and lets the product's ``Checkpointer.resume`` run for every rank, one after another in this process, with the
exchanges between ranks played from records (``tests/many_ranks.py``). Opens, sizes asked for and bytes read are counted where
Python calls the operating system. Seconds are of CPU, of a few ranks, with all that they receive.

``--alone`` is for commit 308446c, where ranks exchanged nothing but failures: two ranks run, and their counts stand for all.
Copy this file and ``tests/many_ranks.py`` into a checkout of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from dattrain.models import zoo
from dattrain.state.format import retention
from dattrain.state.format.manifest import MANIFEST, read_manifest
from tests.many_ranks import Group, Local, counted, write

LAYOUTS = ["64:2>64:2", "64:2>32:2", "64:2>64:3", "256:2>256:2", "256:3>256:3", "256:2>128:2", "256:2>256:3"]
LAYOUTS += [
    "1024:2>1024:2",
    "1024:3>1024:3",
    "1024:2>512:2",
    "1024:2>1024:3",
    "4096:2>4096:2",
    "4096:2>2048:2",
]


def shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of DAT-B's parameters."""
    with torch.device("meta"):
        model = zoo.create("dat_base", num_classes=21841, img_size=224)
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def measure(run: Path, before: tuple[int, int], after: tuple[int, int], *, alone: bool) -> dict[str, object]:
    """One resume from (world, stage) at (world, stage)."""
    named = shapes()
    begin = time.time()
    folder = write(run, named, *before)
    size = sum(p.stat().st_size for p in folder.iterdir())
    world = after[0]
    some = sorted({0, world // 2, world - 1})
    group = Group(run, named, *after)
    states: list[Local]
    if alone:
        some = [0, world // 2]
        pairs = [group.alone(r) for r in some]
        counts, cpu, states = [c for c, _ in pairs], [c.cpu for c, _ in pairs], [s for _, s in pairs]
        total = world * counts[-1].nbytes
    else:
        counts, received, states = group.resume(some)
        cpu = [received[r].cpu for r in some]
        total = sum(c.nbytes for c in counts)
    for local in states:
        assert all(not t.any() for t in local.flat.values()), "something did not arrive"
    own = states[-1].nbytes
    with counted() as pruning:
        retention.prune(run / "checkpoints", retention.Policy())
    return {
        "saved by": before,
        "resumed by": after,
        "checkpoint bytes": size,
        "manifest bytes": (folder / MANIFEST).stat().st_size,
        "header bytes": sum(d.header for d in read_manifest(folder).files.values()),
        "own state bytes": own,
        "ranks run": len(counts),
        "opens, rank 0": counts[0].opens,
        "opens, others": max((c.opens for c in counts[1:]), default=0),
        "opens, all": counts[-1].opens * world if alone else sum(c.opens for c in counts),
        "sizes asked, rank 0": counts[0].stats,
        "sizes asked, others": max((c.stats for c in counts[1:]), default=0),
        "read, rank 0": counts[0].nbytes,
        "read, most by another": max((c.nbytes for c in counts[1:]), default=0),
        "read, all": total,
        "read, all / checkpoint": round(total / size, 2),
        "cpu s": [round(c, 2) for c in cpu],
        "prune opens": pruning.opens,
        "prune sizes asked": pruning.stats,
        "prune cpu s": round(pruning.cpu, 2),
        "took s": round(time.time() - begin),
    }


def main() -> int:
    """Measure what is asked for; one line of JSON each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layouts", nargs="*", default=LAYOUTS, metavar="WORLD:STAGE>WORLD:STAGE")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for words in args.layouts:
        (world, stage), after = ([int(n) for n in side.split(":")] for side in words.split(">"))
        run = Path(tempfile.mkdtemp(prefix="resume-", dir=args.dir))
        try:
            print(
                json.dumps(measure(run, (world, stage), (after[0], after[1]), alone=args.alone)), flush=True
            )
        finally:
            shutil.rmtree(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
