"""An update taken apart: which of its parts the time goes to, by clocks put around the trainer's own calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from dattrain.bench import common
from dattrain.engine.session import Session

MIXING, FORWARD, BACKWARD, OPTIMIZER, EMA, REST = PARTS = (
    "mixing", "forward", "backward", "clip and AdamW", "average (EMA)", "the rest",
)  # fmt: skip


def take_apart(
    session: Session,
    call: Callable[[], object],
    rounds: int,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, common.Spread]:
    """Seconds of each part of an update, over ``rounds`` updates; the parts of one update add up to it.

    ``call`` runs one update of ``session``.

    Under ZeRO 1-3 gradients are reduced within the backward pass. ``REST`` is what the trainer itself does: fetching the batch
    and the numbers, and under stage 0 the gradients' norm.
    """
    watch = Stopwatch(synchronize or (lambda: None), clock)
    turns: list[dict[str, float]] = []
    mixes = hasattr(session.train_step.task, "mixer")
    with ExitStack() as stack:
        for owner, names in (
            (session.train_step, {"forward": FORWARD}),
            (session.train_step.task if mixes else None, {"mixer": MIXING}),
            (session.engine, {"backward": BACKWARD, "step": OPTIMIZER}),
            (session.ema, {"update": EMA}),
        ):
            if owner is not None:
                timed = {name: watch.timed(part, getattr(owner, name)) for name, part in names.items()}
                stack.enter_context(replaced(owner, **timed))
        update = watch.timed(REST, call)
        for _ in range(rounds):
            watch.spent = dict.fromkeys(PARTS, 0.0)
            update()
            turns.append(watch.spent)
    absent = [*([EMA] if session.ema is None else []), *([] if mixes else [MIXING])]
    shown = [part for part in PARTS if part not in absent]
    return {part: common.Spread.from_values([turn[part] for turn in turns]) for part in shown}


class Stopwatch:
    """Charges time to the innermost part that runs."""

    def __init__(self, synchronize: Callable[[], object], clock: Callable[[], float]) -> None:
        self.spent: dict[str, float] = {}
        self._synchronize, self._clock = synchronize, clock
        self._running: list[str] = []
        self._since = math.nan

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time is charged to ``part``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._running.pop()

        return call

    def _charge(self) -> None:
        self._synchronize()
        now = self._clock()
        if self._running:
            part = self._running[-1]
            self.spent[part] = self.spent.get(part, 0.0) + now - self._since
        self._since = now


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """``owner`` with other attributes, inside the block."""
    own: Mapping[str, Any] = vars(owner)
    kept = {name: own[name] for name in attributes if name in own}
    for name, value in attributes.items():
        object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in kept:
                object.__setattr__(owner, name, kept[name])
            else:
                object.__delattr__(owner, name)
