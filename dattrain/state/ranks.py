"""Rank, world, and the two exchanges of small Python objects that saving and loading need."""

from __future__ import annotations

from typing import Any


def rank_and_world() -> tuple[int, int]:
    """Of the default process group; (0, 1) without one."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def broadcast(value: Any) -> Any:
    """Rank 0's ``value``. Collective."""
    import torch.distributed as dist

    if rank_and_world()[1] == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def gather(value: Any) -> list[Any]:
    """Every rank's ``value``, by rank. Collective."""
    import torch.distributed as dist

    world = rank_and_world()[1]
    if world == 1:
        return [value]
    held: list[Any] = [None] * world
    dist.all_gather_object(held, value)
    return held
