"""DAT++ in the authors' names: importing this registers its modules with ``names.links``."""

from __future__ import annotations

from collections.abc import Iterator

from dattrain.models.authors.names import Link, links, only, pointwise, same
from dattrain.models.datpp import ConvDownsample, ConvMlp, ConvStem, LocalPerception, NeighborhoodAttention


@links.register
def _stem(module: ConvStem, theirs: str, ours: str) -> Iterator[Link]:
    yield from same(f"{theirs}.0", f"{ours}.conv1")
    yield from same(f"{theirs}.1.norm", f"{ours}.norm1")
    yield from same(f"{theirs}.3", f"{ours}.conv2")
    yield from same(f"{theirs}.4.norm", f"{ours}.norm2")


@links.register
def _downsample(module: ConvDownsample, theirs: str, ours: str) -> Iterator[Link]:
    yield only(f"{theirs}.0.weight", f"{ours}.conv.weight")
    yield from same(f"{theirs}.1.norm", f"{ours}.norm")


@links.register
def _local(module: LocalPerception, theirs: str, ours: str) -> Iterator[Link]:
    yield from same(theirs, ours)


@links.register
def _mlp(module: ConvMlp, theirs: str, ours: str) -> Iterator[Link]:
    yield from pointwise(f"{theirs}.linear1.0", f"{ours}.fc1")
    yield from pointwise(f"{theirs}.linear2.0", f"{ours}.fc2")
    yield from same(f"{theirs}.dwc", f"{ours}.dwconv")


@links.register
def _attention(module: NeighborhoodAttention, theirs: str, ours: str) -> Iterator[Link]:
    yield only(f"{theirs}.rpb", f"{ours}.bias_table")
    yield from same(f"{theirs}.qkv", f"{ours}.qkv")
    yield from same(f"{theirs}.proj", f"{ours}.proj")
