"""How far a long task is, on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line that is written over on a terminal; elsewhere one every half minute. ``shown=False`` says nothing."""

    def __init__(self, what: str, unit: str = "samples", *, shown: bool = True) -> None:
        self.what, self.unit, self.shown = what, unit, shown
        self.start = self.last = time.monotonic()
        self.first: int | None = None
        self.terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int, more: str = "") -> None:
        """``done`` of ``total`` are done; ``more`` is said behind it."""
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if not self.shown or not total or now - self.last < (0.1 if self.terminal else 30.0):
            return
        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if rate else ""
        text = f"{self.what} {done:,} of {total:,} {self.unit} ({100 * done // total}%), {rate:,.0f}/s{left}{more}"
        if self.terminal:
            bar = "#" * (30 * done // total)
            print(f"\r\x1b[K[{bar:<30}] {text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.shown and self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
