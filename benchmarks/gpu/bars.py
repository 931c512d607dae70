"""What is asked of a GPU, as numbers: verdicts on figures, the status of a stage, and the table. Pure functions.

docs/benchmarks/README.md says the same in words; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dattrain.text import columns

Verdict = Literal["met", "missed", "not run"]
Status = Literal["met", "missed", "failed", "not run"]
Figures = Mapping[str, Mapping[str, Any]]
"""Name to ``value`` (a number or words) and ``unit``."""


@dataclass(frozen=True)
class Bar:
    """A limit that a figure of a stage must keep."""

    stage: str
    figure: str
    sense: Literal["at least", "at most"]
    limit: float
    unit: str = ""

    @property
    def asked(self) -> str:
        """``at least 5 times``."""
        return " ".join([self.sense, f"{self.limit:g}", *([self.unit] if self.unit else [])])


def _core(size: str, times: float) -> list[Bar]:
    passes = ("forward", "forward+backward")
    return [
        Bar("core", f"{size} {p}: speed, compiled straightforward = 1", "at least", times, "times")
        for p in passes
    ]


BARS: tuple[Bar, ...] = (
    Bar("kernels", "cases outside their bounds", "at most", 0),
    Bar("kernels", "cases that differ between two runs", "at most", 0),
    *_core("14x14", 5),
    *_core("24x24", 10),
    Bar("core", "24x24: bytes kept for backward, straightforward = 1", "at most", 0.25),
    Bar("model", "dat_tiny 224 px training: speed, swin_tiny = 1, both compiled", "at least", 1, "times"),
    Bar("train", "tensors that differ after SIGKILL and resume", "at most", 0),
    Bar("train", "tensors that differ between background and foreground saves", "at most", 0),
    Bar("train", "losses not finite in fp16", "at most", 0),
    Bar("train", "losses not finite in bf16-pure", "at most", 0),
    Bar("dense", "tensors that differ after SIGKILL and resume", "at most", 0),
    Bar("dense", "losses not finite", "at most", 0),
    Bar("detect", "tensors that differ after SIGKILL and resume", "at most", 0),
    Bar("detect", "losses not finite", "at most", 0),
    Bar("waits", "host waits inside an update that agree on nothing", "at most", 0),
    Bar("augment", "images that differ from the CPU's", "at most", 0),
    Bar("dali", "kinds of JPEG that were not decoded", "at most", 0),
    Bar("checkpoint", "wait for a background save, blocking save = 1", "at most", 0.1),
    Bar(
        "large",
        "dat_base 384 px training: speed, straightforward = 1, both compiled",
        "at least",
        2.5,
        "times",
    ),
    Bar("sanitizer", "memory errors", "at most", 0),
    Bar("counters", "14x14 forward+backward: instructions per score", "at most", 140),
    Bar("counters", "24x24 forward+backward: instructions per score", "at most", 130),
    Bar("tests", "tests that failed", "at most", 0),
)


def verdict(bar: Bar, figures: Figures, *, dry: bool) -> Verdict:
    """Verdict of a bar on a stage's figures. What a dry run measured says nothing about a GPU; NaN keeps no limit."""
    value = figures.get(bar.figure, {}).get("value")
    if dry or not isinstance(value, (int, float)) or isinstance(value, bool):
        return "not run"
    return "met" if (value >= bar.limit if bar.sense == "at least" else value <= bar.limit) else "missed"


def status(stage: str, figures: Figures, *, dry: bool, bars: Sequence[Bar] = BARS) -> Status:
    """Status of a stage that came to its end: the worst verdict of its bars. One without bars is met by having come there."""
    found = {verdict(bar, figures, dry=dry) for bar in bars if bar.stage == stage}
    if "missed" in found:
        return "missed"
    return "not run" if dry or "not run" in found else "met"


def table(entries: Sequence[Mapping[str, Any]], *, dry: bool, bars: Sequence[Bar] = BARS) -> str:
    """The bars with what was measured, then the stages with their other figures."""
    by_stage = {entry["stage"]: entry for entry in entries}
    rows = [("stage", "figure", "measured", "asked", "")]
    for bar in bars:
        if bar.stage not in by_stage:
            continue
        figures = by_stage[bar.stage].get("figures", {})
        value = figures.get(bar.figure, {}).get("value")
        rows.append((bar.stage, bar.figure, shown(value), bar.asked, verdict(bar, figures, dry=dry)))
    lines = columns(rows)
    if dry:
        lines = [
            "DRY RUN with tiny sizes on a CPU: no figure below is one of a GPU, and none counts.",
            "",
            *lines,
        ]
    barred = {(bar.stage, bar.figure) for bar in bars}
    for entry in entries:
        reason = f" ({entry['reason']})" if entry.get("reason") else ""
        lines += ["", f"{entry['stage']}: {entry['status']}{reason}, {entry.get('seconds', 0):.0f} s"]
        others = {n: f for n, f in entry.get("figures", {}).items() if (entry["stage"], n) not in barred}
        lines += columns([(f"  {n}", shown(f["value"]), f.get("unit", "")) for n, f in others.items()])
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A value in a cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)
