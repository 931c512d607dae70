"""What ranks ask of each other: how they find each other, which sockets they keep, and what an agreement takes by a model.

The alpha-beta model: a message of n bytes takes alpha + n beta seconds. Costs of the algorithms are those of R. Thakur, R. Rabenseifner
and W. Gropp, "Optimization of Collective Communication Operations in MPICH", International Journal of High Performance
Computing Applications 19 (2005). No network was measured: alpha and beta below are assumptions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dattrain.config.sections import Health
from dattrain.files import readable_size
from dattrain.planning.network import Network
from dattrain.runtime import collectives, environment, health, preflight
from tests.counting_store import GlooGroup

RANKS_OF_A_NODE = 8
GROUPS = 2
"""Of all ranks: torch's own, and DeepSpeed's copy of it. Counted around ``zero.initialize`` at stages 1 to 3."""
REQUESTS_S = 20_000
"""That a TCPStore answers in a second: 14,000 (``get`` of 8 kB) to 33,000 (``check``) were measured on two cores that its clients used
too. An order of magnitude."""
IN_ONE_PROCESS = {"full": 64, "lazy": 256}
"""Ranks that one process can hold with 20,000 descriptors."""

GLOO_ALPHA, GLOO_BETA = 30.0, 1 / 1250
"""Microseconds of a message over TCP between nodes, and of a byte at 10 Gbit/s. Assumed."""
STALL_S = Health().stall_seconds
STATUS = 80
"""Bytes that an update agrees on: eight numbers and two parts of the loss, fp64 (``engine.step_status``)."""


def exchanges(world: int) -> set[tuple[int, int]]:
    """Pairs of ranks that gloo connects for an all-reduce, a broadcast, a barrier, an all-gather and a gather from rank 0."""
    distances = [1 << k for k in range(math.ceil(math.log2(world)))]
    found = {(r, (r + 1) % world) for r in range(world)}  # the ring of all-reduce and all-gather
    found |= {(0, r) for r in range(1, world)}  # gather
    found |= {(r, r + d) for d in distances for r in range(min(d, world - d))}  # a broadcast's tree
    found |= {(r, (r + d) % world) for d in distances for r in range(world)}  # a barrier's rounds
    return {(min(pair), max(pair)) for pair in found}


def rendezvous(world: int, folder: Path) -> dict[str, Any]:
    """One gloo group, all connected with all and as ``environment.connect`` has it; rank 0's store and the sockets."""
    full, value = _full(world)
    lazy = 2 * len(exchanges(world))
    busiest = sum(0 in pair for pair in exchanges(world))
    if world <= IN_ONE_PROCESS["lazy"]:
        with _connecting(lazily=True):
            group = GlooGroup(world)
            group.use()
        assert (group.counts["set"], group.counts["get"]) == (world, lazy), group.counts
    barrier = 3 * world + 1  # torch's, after each group is made (distributed_c10d._store_based_barrier)
    return {
        "all with all: requests of a group at the store": world + 2 * full,
        "all with all: bytes from the store": readable_size(full * value),
        "all with all: s of the store, at 20,000 requests/s": (world + 2 * full) / REQUESTS_S,
        "all with all: connections": world * (world - 1) // 2,
        f"all with all: sockets of a rank, {GROUPS} groups": GROUPS * (world - 1),
        "as it is: requests of a group at the store": world + 2 * lazy,
        "as it is: bytes from the store": readable_size(lazy * 154),
        f"as it is: s of the store, {GROUPS} groups and barriers": GROUPS
        * (world + 2 * lazy + barrier)
        / REQUESTS_S,
        "as it is: connections": lazy // 2,
        f"as it is: sockets of rank 0, {GROUPS} groups at most, and its store": GROUPS * busiest + world,
        f"as it is: sockets of another, {GROUPS} groups at most": GROUPS
        * (2 * math.ceil(math.log2(world)) + 1)
        + 1,
        "preflight: folders listed in the minute until a folder is given up, by all": world * _looks(),
        "stall marker: looks in a second, by all": round(
            world / health.pause(world, STALL_S, health.GRACE_S)
        ),
        "waiting for rank 0: requests in a second, by all": round((world - 1) / collectives.pause(world)),
    }


def _full(world: int) -> tuple[int, int]:
    """Values that all ask for together where all connect with all, and the bytes of one: counted at small worlds."""
    sizes = {}
    for each in (8, 16, min(world, IN_ONE_PROCESS["full"])):
        sizes[each] = _counted(each)
    slope = (sizes[16] - sizes[8]) // 8
    base = sizes[8] - 8 * slope
    assert all(size == base + slope * each for each, size in sizes.items()), sizes
    return world**2, base + slope * world


@cache
def _counted(world: int) -> int:
    """Bytes of a value of ``world`` ranks that connect all with all: 64 take 20 s, and each larger number asks for them."""
    with _connecting(lazily=False):
        counts = GlooGroup(world).counts
    assert counts["get"] == counts["wait"] == world**2, counts
    return counts["get bytes"] // world**2


@contextmanager
def _connecting(*, lazily: bool) -> Iterator[None]:
    before = os.environ.get(environment.LAZY)
    os.environ[environment.LAZY] = str(int(lazily))
    try:
        yield
    finally:
        os.environ.pop(environment.LAZY)
        if before is not None:
            os.environ[environment.LAZY] = before


def _looks() -> int:
    seconds, pause, looks = 0.0, preflight._LOOK_S, 0
    while seconds <= preflight._VISIBLE_S:
        seconds, pause, looks = seconds + pause, min(2 * pause, preflight._LONGEST_S), looks + 1
    return looks


def agreement(world: int, folder: Path) -> dict[str, Any]:
    """What it takes to agree on an update's status, to wait for a barrier, and to send a piece of a checkpoint to all. Model."""
    steps = math.ceil(math.log2(world))
    message = GLOO_ALPHA + STATUS * GLOO_BETA
    ring = 2 * (world - 1) * (GLOO_ALPHA + STATUS / world * GLOO_BETA)
    chunk = 16 << 20
    files = world  # of another layout: for each a count, a table, and its bytes (state.relay)
    size = 1.75e9 / files
    relayed = files * steps * (3 * GLOO_ALPHA + size * GLOO_BETA) / 1e6
    return {
        "status on GPUs: NCCL, us": 1e6 * Network().all_reduce(STATUS, world, RANKS_OF_A_NODE),
        "status on CPUs: gloo's ring, us": ring,
        "status by recursive doubling, us": steps * message,
        "barrier of gloo, us": steps * GLOO_ALPHA,
        "all-gather of a small object, gloo's ring, us": (world - 1) * message,
        "broadcast of 16 MiB, binomial tree, s": steps * (GLOO_ALPHA + chunk * GLOO_BETA) / 1e6,
        "a resume at another layout: broadcasts": 3 * files,
        "a resume at another layout: s on the network": relayed,
    }
