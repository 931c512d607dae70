"""Which checkpoints to keep. ``to_remove`` is a pure function; ``prune`` acts on it."""

from __future__ import annotations

import errno
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dattrain.errors import Damaged
from dattrain.state.format import checkpoint
from dattrain.state.format.checkpoint import CheckpointInfo


@dataclass(frozen=True)
class Policy:
    """Keep the last ``keep_last``, the first of every ``keep_every_epochs``, and the ``keep_best`` by ``metric``.

    A metric named ``*loss*`` is better when lower, any other when higher. A checkpoint saved because of a preemption
    counts like every other. Pinned ones are kept and do not count.
    """

    keep_last: int = 2
    keep_every_epochs: float | None = None
    keep_best: int = 0
    metric: str = "top1"

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last}: at least one checkpoint must be kept")
        if self.keep_every_epochs is not None and not self.keep_every_epochs > 0:
            raise ValueError(f"keep_every_epochs={self.keep_every_epochs} must be positive")


def lower_is_better(metric: str) -> bool:
    """Whether less of ``metric`` is better: where its name has ``loss`` in it."""
    return "loss" in metric


def best_step(scores: Mapping[int, float], metric: str) -> int:
    """The step with the best of ``metric``, of equals the newest; ``scores`` by step, not empty."""
    sign = -1 if lower_is_better(metric) else 1
    return max(scores, key=lambda step: (sign * scores[step], step))


def by_metric(entries: Sequence[CheckpointInfo], metric: str) -> list[CheckpointInfo]:
    """Those that were evaluated by ``metric``, the best first, of equals the newest."""
    sign = 1.0 if lower_is_better(metric) else -1.0
    scored = [(sign * value, -e.step, e) for e in entries if (value := e.metric(metric)) is not None]
    return [entry for _, _, entry in sorted(scored, key=lambda each: each[:2])]


def kept(entries: Sequence[CheckpointInfo], policy: Policy) -> dict[str, str]:
    """The complete checkpoints among ``entries`` (oldest first) that ``policy`` keeps: name to reason.

    Those that are not complete are neither kept nor removed by any rule: they may be evidence, and count for nothing.
    """
    complete = [(e, e.manifest) for e in entries if e.manifest is not None]
    reasons: dict[str, str] = {e.folder.name: "pinned" for e, _ in complete if e.pinned}
    free = [(e, m) for e, m in complete if not e.pinned]
    # The newest complete one stays even if keep_last were to count pinned ones only.
    for entry, _ in [*free[-policy.keep_last :], *complete[-1:]]:
        reasons.setdefault(entry.folder.name, "last")
    if policy.keep_every_epochs is not None:
        seen: set[int] = set()
        for entry, manifest in complete:
            epoch = manifest.meta.get("epoch")
            if not isinstance(epoch, (int, float)) or not math.isfinite(epoch):
                continue
            # An epoch's end computed as samples / samples_per_epoch may fall short of the integer by rounding.
            period = math.floor(epoch / policy.keep_every_epochs + 1e-9)
            if period >= 1 and period not in seen:
                seen.add(period)
                reasons.setdefault(entry.folder.name, f"every {policy.keep_every_epochs:g} epochs")
    for entry in by_metric([e for e, _ in complete], policy.metric)[: policy.keep_best]:
        reasons.setdefault(entry.folder.name, f"best {policy.metric}")
    return reasons


def to_remove(entries: Sequence[CheckpointInfo], policy: Policy) -> list[CheckpointInfo]:
    """The complete checkpoints that ``policy`` does not keep, oldest first; never the newest complete one."""
    keep = kept(entries, policy)
    return [e for e in entries if e.manifest is not None and e.folder.name not in keep]


def confirmed(found: list[CheckpointInfo], policy: Policy) -> list[CheckpointInfo]:
    """``found``, where those that are kept as the last ones have been read: others are removed because these are there."""
    read: set[str] = set()
    while to_remove(found, policy):
        reasons = kept(found, policy)
        last = [
            i
            for i, e in enumerate(found)
            if reasons.get(e.folder.name) == "last" and e.folder.name not in read
        ]
        if not last:
            break
        entry = found[last[-1]]
        read.add(entry.folder.name)
        try:
            checkpoint.verify(entry.folder)
        except Damaged as error:
            found[last[-1]] = replace(entry, manifest=None, reason=str(error))
    return found


def prune(root: Path, policy: Policy, damaged: Collection[str] = ()) -> list[str]:
    """Remove what ``policy`` does not keep; returns the names. Each vanishes by a rename before it is deleted.

    ``damaged`` are names of those that have their sizes, but were found damaged by whoever read them.
    """
    gone = []
    found = checkpoint.list_all(root)
    found = [replace(e, manifest=None) if e.folder.name in damaged else e for e in found]
    for entry in to_remove(found, policy):
        try:
            checkpoint.remove(entry.folder)
        except OSError as error:
            if error.errno != errno.ENOENT:  # somebody has removed it by hand
                raise
        else:
            gone.append(entry.folder.name)
    return gone
