"""Rank, world, and the exchanges that saving and loading need: of small Python objects, of bytes, of failures."""

from __future__ import annotations

import pickle
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dattrain.errors import Damaged, UserError

T = TypeVar("T")

_LOOK_S = 0.2
"""Between two looks of a rank that waits for the first."""
_LOOKS = 5000.0
"""Looks that all together take in a second at most: a store answers 20,000 or so."""


def pause(world: int) -> float:
    """Seconds between two looks of each of ``world`` ranks that wait for the first."""
    return max(_LOOK_S, world / _LOOKS)


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) without one."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def broadcast(value: Any, source: int = 0) -> Any:
    """The ``value`` of rank ``source``. Collective."""
    if rank_and_world()[1] == 1:
        return value
    obj_list = [value]
    dist.broadcast_object_list(obj_list, src=source)
    return obj_list[0]


def broadcast_tensor(data: Tensor, source: int) -> None:
    """Fill ``data``, contiguous and in host memory, with that of rank ``source``. Collective."""
    if rank_and_world()[1] > 1:
        dist.broadcast(data, src=source)


def all_gather(value: Any) -> list[Any]:
    """Every rank's ``value``, by rank. Collective."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    obj_list: list[Any] = [None] * world
    dist.all_gather_object(obj_list, value)
    return obj_list


def gather_to_first(value: Any) -> list[Any] | None:
    """Every rank's ``value``, by rank, on rank 0; None on the others. Collective."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    obj_list: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(value, obj_list, dst=0)
    return obj_list


# What fails on one rank ends on all.


def together(action: Callable[[], T]) -> list[T]:
    """Run ``action`` on every rank; all its (small) values, by rank. Collective.

    Raises:
        Damaged: some rank's action did; on every rank, in the words of the first.
        UserError: another rank's action raised something else. What this rank's own raised is raised as it is.
    """
    value, failure = _attempt(action)
    gathered = all_gather((value, _for_others(failure)))
    if failure is not None and not isinstance(failure, Damaged):
        raise failure
    failures = [each for _, each in gathered if each is not None]
    if failures:
        # A damaged file may have an older one behind it: it comes last.
        raise min(failures, key=lambda each: isinstance(each, Damaged))
    return [each for each, _ in gathered]


def from_first(action: Callable[[], T]) -> T:
    """What ``action`` gives on rank 0, which alone runs it. Collective. Raises as ``together``, on every rank."""
    value, failure = _attempt(action) if rank_and_world()[0] == 0 else (None, None)
    result: T
    result, reported = broadcast((value, _for_others(failure)))
    if failure is not None or reported is not None:
        raise failure or reported
    return result


def on_first(action: Callable[[], T], waiting: Callable[[], object] = lambda: None) -> T:
    """As ``from_first``, for an ``action`` that may take longer than a collective's timeout.

    The other ranks look for the result in the process group's store instead of waiting in a collective, which would time out with
    minutes of work on rank 0 (open-mmlab/mmdetection#11096).

    Args:
        waiting: called now and then where that is waited for.
    """
    rank, world = rank_and_world()
    if world == 1:
        return action()
    store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined,unused-ignore]
    # A name that no other call has, agreed on while all are together.
    key = f"dattrain/on_first/{broadcast(secrets.token_hex(8))}"
    if rank == 0:
        # Pickled within, lest a value that cannot be leave the others waiting.
        done, failure = _attempt(lambda: _pickled(action()))
        result = pickle.dumps((None, _for_others(failure))) if done is None else done[1]
        store.set(key, result)  # type: ignore[arg-type,unused-ignore]
        if done is None:
            assert failure is not None
            raise failure
        return done[0]
    while not store.check([key]):
        waiting()
        time.sleep(pause(world))
    value: T
    value, reported = pickle.loads(store.get(key))
    # The last to have read it leaves nothing behind.
    if store.add(f"{key}/read", 1) == world - 1:
        store.delete_key(key)
        store.delete_key(f"{key}/read")
    if reported is not None:
        raise reported
    return value


def raise_from(source: int, failure: Exception | None) -> NoReturn:
    """Raise the failure of rank ``source`` on every rank. Collective; as ``together``."""
    reported = broadcast(_for_others(failure), source)
    raise failure or reported


def tensors_from_first(produce: Callable[[], Iterable[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) that ``produce`` gives on rank 0, which alone runs it, one after another, on the host of every rank.

    Collective, and to be used up. Raises as ``together``, on every rank.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield from produce()
        return
    source: Iterator[tuple[str, Tensor]] | None = None
    tensor = torch.empty(0)

    def step() -> tuple[str, torch.dtype, tuple[int, ...]] | None:
        nonlocal source, tensor
        if source is None:
            source = iter(produce())
        found = next(source, None)
        if found is None:
            return None
        tensor = found[1].detach().cpu().contiguous()
        return found[0], tensor.dtype, tuple(tensor.shape)

    while (header := from_first(step)) is not None:
        name, dtype, shape = header
        if rank:
            tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            broadcast_tensor(tensor.reshape(-1).view(torch.uint8), 0)
        yield name, tensor


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as e:
        return None, e


def _pickled(value: T) -> tuple[T, bytes]:
    return value, pickle.dumps((value, None))


def _for_others(failure: Exception | None) -> Exception | None:
    """The failure as other ranks raise it: ours as it is, anything else (which may not be picklable) as a UserError."""
    if failure is None or isinstance(failure, (Damaged, UserError)):
        return failure
    return UserError(f"rank {rank_and_world()[0]}: {type(failure).__name__}: {failure}")
