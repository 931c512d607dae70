"""Seconds of a collective between GPUs by an alpha-beta model, whose constants are NCCL's own. Pure; no network is looked at.

A collective takes a latency for each of its steps and its bytes at a bandwidth. NCCL chooses algorithm and protocol by such a
model (``src/graph/tuning.cc`` of NVIDIA/nccl, where the steps are counted and the latencies below stand), and so does this one:
rings and trees, with the protocols LL, LL128 and Simple, whichever is fastest for the size. Left out are NVLink SHARP,
switches that reduce (SHARP), NCCL's correction of trees of medium sizes, and other jobs on the same network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log2


@dataclass(frozen=True)
class Protocol:
    """How NCCL sends: latencies in microseconds, bandwidths as shares of the links'."""

    name: str
    ring_launch_us: float
    tree_launch_us: float
    ring_node_us: float
    """A step between two devices of a node, in a ring."""
    ring_net_us: float
    tree_node_us: float
    tree_net_us: float
    ring_share: float
    tree_share: float
    most_gb_s: float | None = None
    """Of a ring or tree over several nodes, whatever the links."""


PROTOCOLS = (
    Protocol("LL", 6.6, 6.8, 0.6, 2.7, 0.6, 5.0, 1 / 4, 0.92 / 3.8, 19.0),
    Protocol("LL128", 14.0, 14.0, 1.9, 4.0, 1.25, 8.5, 0.92, 0.92 * 0.9375),
    Protocol("Simple", 8.4, 0.0, 3.4, 14.0, 28.0, 28.0, 1.0, 0.92),
)
"""NCCL 2.20's, for NVLink within a node and a network between them."""


def given(value: float, source: str) -> float:
    """A field of a dataclass with this default, and where it is from as its metadata."""
    default: float = field(default=value, metadata={"source": source})
    return default


@dataclass(frozen=True)
class Network:
    """Links of a device. Every field says in its metadata (``source``) where the default is from."""

    nvlink_gb_s: float = given(
        370.8,
        "NVLink 4, a direction: 18 links of 25 GB/s by NVIDIA's data sheet (450); NCCL counts on 20.6 of each",
    )
    net_gb_s: float = given(
        50.0, "one NDR InfiniBand port of 400 Gb/s for each device, as a DGX H100 has by its data sheet"
    )
    net_achieved: float = given(0.9, "assumed: the share of net_gb_s that a long message gets")

    def bus_gb_s(self, world: int, per_node: int) -> float:
        """GB/s at which each device of a ring sends: the node's ports together, or its NVLinks, whichever is less."""
        if world <= per_node:
            return self.nvlink_gb_s
        return min(self.nvlink_gb_s, per_node * self.net_gb_s * self.net_achieved)

    def all_reduce(self, size: float, world: int, per_node: int) -> float:
        """Seconds to sum ``size`` bytes over ``world`` devices so that all have the sum."""
        if world == 1:
            return 0.0
        return min(
            seconds
            for protocol in PROTOCOLS
            for seconds in (
                self._ring(protocol, size, world, per_node, passes=2),
                self._tree(protocol, size, world, per_node),
            )
        )

    def all_gather(self, size: float, world: int, per_node: int) -> float:
        """Seconds until all have the ``size`` bytes of which each had a part. NCCL has rings alone for it."""
        if world == 1:
            return 0.0
        return min(self._ring(protocol, size, world, per_node, passes=1) for protocol in PROTOCOLS)

    reduce_scatter = all_gather
    """Seconds to sum ``size`` bytes so that each has its part: an all-gather's steps and bytes, the other way round."""

    def _ring(self, protocol: Protocol, size: float, world: int, per_node: int, *, passes: int) -> float:
        nodes = -(-world // per_node)
        steps = passes * (world - 1)
        between = passes * (nodes - 1)
        latency = (
            protocol.ring_launch_us
            + (steps - between) * protocol.ring_node_us
            + between * protocol.ring_net_us
        )
        bandwidth = self._limited(protocol, protocol.ring_share, world, per_node)
        return latency * 1e-6 + ring_bytes(size, world, passes) / bandwidth

    def _tree(self, protocol: Protocol, size: float, world: int, per_node: int) -> float:
        nodes = -(-world // per_node)
        within = min(world, per_node) - 1
        latency = (
            protocol.tree_launch_us
            + 2 * within * protocol.tree_node_us
            + 2 * log2(nodes) * protocol.tree_net_us
        )
        bandwidth = self._limited(protocol, protocol.tree_share, world, per_node)
        return latency * 1e-6 + 2 * size / bandwidth

    def _limited(self, protocol: Protocol, share: float, world: int, per_node: int) -> float:
        """Bytes a second."""
        found = share * self.bus_gb_s(world, per_node)
        if protocol.most_gb_s is not None and world > per_node:
            found = min(found, protocol.most_gb_s)
        return found * 1e9


def ring_bytes(size: float, world: int, passes: int) -> float:
    """Bytes that each device sends: ``passes`` is 2 for an all-reduce, 1 for its halves, all-gather and reduce-scatter."""
    return passes * (world - 1) / world * size
