from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dattrain.data.order import Order

counts = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda c: sum(c) > 0)
settings_of_orders = st.fixed_dictionaries(
    {
        "counts": counts,
        "seed": st.integers(0, 2**64 - 1),
        "lanes": st.integers(1, 70),
        "window": st.integers(1, 6),
        "shuffle": st.booleans(),
    }
)
orders = settings_of_orders.map(lambda kwargs: Order(**kwargs))


def pairs(order: Order, positions) -> list[tuple[int, int]]:
    shard, sample = order.locate(positions)
    return list(zip(shard.tolist(), sample.tolist()))


@given(orders, st.integers(0, 5))
def test_an_epoch_is_a_permutation(order, epoch):
    seen = pairs(order, np.arange(order.samples) + epoch * order.samples)
    everything = [(s, i) for s, count in enumerate(order.counts.tolist()) for i in range(count)]
    assert sorted(seen) == everything
    if not order.shuffle:
        assert seen == everything


@given(orders, st.integers(0, 2**40), st.sampled_from([1, 2, 3, 8, 1024]), st.integers(1, 3))
@settings(max_examples=25)
def test_ranks_share_every_global_batch_without_overlap(order, seen, world, share):
    """Ranks' slots are disjoint, their union is the batch, and the order of slots does not depend on the world."""
    batch = 3 * 1024 * share
    whole = order.batch_positions(seen, batch)
    assert sorted(whole.tolist()) == list(range(seen, seen + batch))
    parts = [order.rank_positions(seen, batch, rank, world) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(settings_of_orders, st.integers(0, 2**40), st.integers(1, 64))
def test_seek_needs_no_past(kwargs, position, length):
    """A fresh order that jumps to a position says what one says that walked there."""
    walked = Order(**kwargs)
    walk = [pairs(walked, [p])[0] for p in range(position, position + length)]
    assert pairs(Order(**kwargs), np.arange(position, position + length)) == walk


@given(orders, st.integers(0, 10**6), st.sampled_from([1, 2, 4]))
@example(Order([1, 1, 1], seed=0, lanes=1, window=1, shuffle=False), 0, 1)  # a batch longer than two windows
def test_hint_covers_what_is_read(order, seen, world):
    """Every shard of a rank's batch is in its hint, so a cache that follows the hints never misses."""
    for rank in range(world):
        read = set(order.locate(order.rank_positions(seen, 16, rank, world))[0].tolist())
        assert read <= set(order.shards_to_prefetch(seen, 16, rank, world))


def test_a_rank_reads_the_shards_of_its_lanes():
    """With lanes divided by the world, a rank keeps to few shards for a whole window."""
    order = Order(np.full(64, 100), seed=1, lanes=16, window=2)
    windows = 64 * 100 // 16 // 200
    for rank in range(4):
        start = 200 * 16 * (rank % windows)
        touched: set[int] = set()
        for step in range(50):  # 50 batches of 64: one window of each lane
            at = order.rank_positions(start + 64 * step, 64, rank, 4)
            assert set((order.lane(at) // 4).tolist()) == {rank}
            touched |= set(order.locate(at)[0].tolist())
        assert len(touched) <= 4 * 3  # four lanes, and a window of two shards touches three at most


def test_epochs_and_seeds_differ():
    order = Order(np.full(20, 50), seed=1, lanes=8)
    one, two = pairs(order, np.arange(1000)), pairs(order, np.arange(1000, 2000))
    other = pairs(Order(np.full(20, 50), seed=2, lanes=8), np.arange(1000))
    for a, b in ((one, two), (one, other)):
        assert sum(x == y for x, y in zip(a, b)) < 20


def test_order_is_frozen():
    """A change of these numbers changes what every run on disk would see next: it needs a new format, not a new test."""
    order = Order([7, 0, 100, 3, 55], seed=3, lanes=8, window=2)
    assert pairs(order, [0, 1, 2, 164, 165, 10**9]) == FROZEN


FROZEN = [(0, 5), (2, 26), (2, 35), (2, 84), (2, 9), (4, 43)]


def test_windows_shuffle_like_a_full_shuffle():
    """Classes in sorted shards, the worst case: windows over many lanes leave little of the sorting in a batch."""
    shards, size, classes = 128, 64, 32
    label = np.repeat(np.arange(classes), shards * size // classes).reshape(shards, size)
    order = Order(np.full(shards, size), seed=0, lanes=64, window=4)
    shard, sample = order.locate(np.arange(order.samples))
    seen = label[shard, sample]
    rng = np.random.default_rng(0)
    full = rng.permutation(seen)
    batch = 256

    def distinct(labels):
        return np.mean([len(set(b.tolist())) for b in labels.reshape(-1, batch)])

    assert distinct(seen) > 0.97 * distinct(full)
    assert abs(np.corrcoef(seen[:-1], seen[1:])[0, 1]) < 0.05


def test_threads_share_an_order():
    """Readers of a small set are in several epochs at once: here two others come between any two steps of the first."""
    shared = Order([3, 5, 2], seed=1)
    positions = np.arange(60)
    expected, came = Order([3, 5, 2], seed=1).locate(positions), 0

    def between(frame, event, _):
        nonlocal came
        if frame.f_code is not Order._epoch.__code__:
            return None
        assert came < 2_000, "never done"
        frame.f_trace_opcodes = True
        for epoch in (7 + came % 2, 9):
            shared.locate([10 * epoch])
        came += 1
        return between

    before = sys.gettrace()
    sys.settrace(between)
    try:
        found = shared.locate(positions)
    finally:
        sys.settrace(before)
    assert came > 6 and all(map(np.array_equal, found, expected))


@pytest.mark.parametrize("size", [2, 3, 6, 17])
def test_small_windows_are_permuted_evenly(size):
    """Each element of a window comes first equally often, and the second is independent of it."""
    lanes = 6000
    order = Order(np.full(lanes, size), seed=9, lanes=lanes, window=1)
    assert order.window_samples == size
    line = order._line(0, np.arange(2 * lanes)).reshape(2, lanes) - np.arange(lanes) * size
    assert line.min() == 0 and line.max() == size - 1
    table = np.zeros((size, size))
    np.add.at(table, (line[0], line[1]), 1)
    assert (np.diag(table) == 0).all()
    expected = lanes / (size * (size - 1))
    chi = ((table - expected) ** 2 / expected)[~np.eye(size, dtype=bool)].sum()
    degrees = size * (size - 1) - 1
    assert chi < degrees + 4.5 * np.sqrt(2 * degrees) + 6


@pytest.mark.parametrize("bad", [[], [0, 0], [3, -1]])
def test_impossible_counts_are_refused(bad):
    with pytest.raises(ValueError, match="counts"):
        Order(bad, seed=0)
