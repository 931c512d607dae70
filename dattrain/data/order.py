"""Which sample is seen at which position: a pure, closed-form function of (seed, position). Seek is O(1).

An epoch permutes the shards, lays their samples end to end, and cuts that line into ``lanes`` pieces whose lengths
differ by at most one. Each lane is permuted inside windows of ``window`` shards' worth of samples. The epoch's index
``i`` takes from lane ``i % lanes``, place ``i // lanes``. As the line is cut by sample and not by shard, the lanes
that are one longer are just the first ones, and every index below the number of samples falls on a place that
exists: an epoch ends without padding, and no sample is dropped or seen twice.

Nothing here knows of ranks but ``Order.rank_positions``, which cuts a global batch. No state is kept but tables of
the epochs in use, of the size of the shard list.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dattrain.data.philox import Stream, philox4x32

_ROUNDS = 6


class Order:
    """The order of a set of shards.

    Args:
        counts: samples per shard, in the canonical order of the shards.
        seed: any integer in [0, 2**64).
        lanes: number of lanes; fewer samples than lanes give one lane per sample.
        window: length of a shuffle window in shards of mean length.
        shuffle: False gives the canonical order in every epoch, in one lane.
    """

    def __init__(
        self, counts: ArrayLike, *, seed: int, lanes: int = 64, window: int = 4, shuffle: bool = True
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        if self.counts.ndim != 1 or (self.counts < 0).any() or self.samples == 0:
            raise ValueError("counts must be one non-negative number per shard, and not all zero")
        self.seed = seed
        self.shuffle = shuffle
        self.lanes = min(lanes, self.samples) if shuffle else 1
        filled = int((self.counts > 0).sum())
        self.window_samples = max(1, round(window * self.samples / filled))
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def locate(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard number and number of the sample in its shard, for each global position (int64)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, indexes = np.divmod(positions, self.samples)
        shard, sample = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            permutation, ends = self._epoch(int(epoch))
            line = self._line(int(epoch), indexes[at])
            slot = np.searchsorted(ends, line, side="right")
            shard[at] = permutation[slot]
            sample[at] = line - (ends[slot] - self.counts[permutation[slot]])
        return shard, sample

    def lane(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Lane of each global position."""
        return np.asarray(positions, dtype=np.int64) % self.samples % self.lanes

    def batch_positions(self, samples_seen: int, global_batch: int) -> NDArray[np.int64]:
        """The slots of one global batch: its positions, stably sorted by lane."""
        positions = np.arange(samples_seen, samples_seen + global_batch, dtype=np.int64)
        return positions[np.argsort(self.lane(positions), kind="stable")]

    def rank_positions(
        self, samples_seen: int, global_batch: int, rank: int, world: int
    ) -> NDArray[np.int64]:
        """The slots of one rank; ``world`` divides ``global_batch``."""
        share = global_batch // world
        return self.batch_positions(samples_seen, global_batch)[rank * share : (rank + 1) * share]

    def shards_to_prefetch(self, samples_seen: int, global_batch: int, rank: int, world: int) -> list[int]:
        """Shards that a rank needs: of this batch, of the rest of its lanes' windows, then of the windows that follow."""
        positions = self.rank_positions(samples_seen, global_batch, rank, world)
        _, first = np.unique(self.lane(positions), return_index=True)
        epochs, indexes = np.divmod(positions[first], self.samples)
        found = dict.fromkeys(self.locate(positions)[0].tolist())
        for _ in range(2):
            place, lane = np.divmod(indexes, self.lanes)
            start, size, place_after, length = self._window(lane, place)
            for e, begin, count in zip(epochs.tolist(), start.tolist(), size.tolist()):
                permutation, ends = self._epoch(e)
                low, high = np.searchsorted(ends, (begin, begin + count - 1), side="right")
                found.update(dict.fromkeys(permutation[low : high + 1].tolist()))
            over = place_after >= length
            epochs = epochs + over
            indexes = np.where(over, lane, place_after * self.lanes + lane)
        return [shard for shard in found if self.counts[shard]]

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards in the epoch's order, and where each ends on the line."""
        # Threads share the tables (DALI's readers): the dict is replaced, never changed, and what was found is what is returned.
        known = self._epochs
        if epoch in known:
            return known[epoch]
        number = np.arange(len(self.counts), dtype=np.uint64)
        if self.shuffle:
            high, low, _, _ = philox4x32(number, epoch, 0, int(Stream.SHARDS), key=self.seed)
            permutation = np.argsort((high << np.uint64(32)) | low, kind="stable")
        else:
            permutation = number.astype(np.int64)
        table = permutation, np.cumsum(self.counts[permutation])
        self._epochs = {**dict(list(known.items())[-1:]), epoch: table}
        return table

    def _line(self, epoch: int, indexes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place on the epoch's line for each index of the epoch."""
        if not self.shuffle:
            return indexes
        place, lane = np.divmod(indexes, self.lanes)
        start, size, place_after, _ = self._window(lane, place)
        first = place_after - size
        keys = self._round_keys(epoch, lane, first)
        return start + _permute(place - first, size, keys)

    def _window(
        self, lane: NDArray[np.int64], place: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The window that holds a lane's place: start on the line, length, the place after it, the lane's length."""
        shortest, longer = divmod(self.samples, self.lanes)
        length = shortest + (lane < longer)
        # A lane's windows are of equal length, give or take one, so that no short one is left over at its end.
        windows = -(-length // self.window_samples)
        window = place * windows // length
        first = -(-window * length // windows)
        after = -(-(window + 1) * length // windows)
        return lane * shortest + np.minimum(lane, longer) + first, after - first, after, length

    def _round_keys(
        self, epoch: int, lane: NDArray[np.int64], window: NDArray[np.int64]
    ) -> NDArray[np.uint64]:
        """Keys of the Feistel rounds of each window, named by its lane and first place: rounds x B."""
        windows, back = np.unique(np.stack((lane, window)), axis=1, return_inverse=True)
        stream = Stream.WINDOW + (epoch << 8)
        blocks = np.arange(-(-_ROUNDS // 4))[:, None]
        keys = np.concatenate(philox4x32(blocks, windows[1], windows[0], stream, key=self.seed))
        return keys[:_ROUNDS, back.reshape(-1)]


def _permute(
    value: NDArray[np.int64], size: NDArray[np.int64], keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """A keyed permutation of [0, size), elementwise.

    A Feistel network on the next power of four, with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002).
    """
    bits = np.ceil(np.log2(np.maximum(size, 2))).astype(np.uint64)
    half = (bits + np.uint64(1)) >> np.uint64(1)
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = value.astype(np.uint64)
    limit = size.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        h, m = half[walking], mask[walking]
        left, right = out[walking] >> h, out[walking] & m
        for key in keys[:, walking]:
            left, right = right, left ^ (_mix(right + key) & m)
        out[walking] = (left << h) | right
        walking = walking[out[walking] >= limit[walking]]
    return out.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit finaliser with full avalanche (Stafford's thirteenth variant, as in splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
