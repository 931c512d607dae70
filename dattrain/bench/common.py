"""What every ``dattrain bench`` shares: an alternating timer, and a report as text, JSON, Markdown and picture.

Contenders take turns, so that whatever else the machine does falls on all of them; a ratio is the median of the ratios
of neighbours in time, and comes with its quartiles.
"""

from __future__ import annotations

import gc
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from dattrain.errors import UserError
from dattrain.text import columns


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Spread:
        """Median and quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Measurement:
    """One contender in one case. Times are seconds per call.

    ``ratio`` and ``cpu_ratio`` say how many times faster than the case's baseline, by wall and by process CPU time.
    """

    case: str
    name: str
    baseline: str
    wall: Spread
    cpu: Spread
    ratio: Spread
    cpu_ratio: Spread
    items: float | None = None
    """Work items (images, bytes) per call, for throughput."""
    extra: Mapping[str, float | str | None] = field(default_factory=dict)
    """More columns of the report."""

    @property
    def throughput(self) -> float | None:
        """Items per second at the median."""
        return None if self.items is None else self.items / self.wall.median

    @property
    def shown_ratio(self) -> str:
        """``1.05x (1.03-1.06)``: median and quartiles."""
        return f"{self.ratio.median:.2f}x ({self.ratio.low:.2f}-{self.ratio.high:.2f})"


def compare(
    case: str,
    contenders: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int = 9,
    warmup: int = 2,
    min_seconds: float = 0.05,
    items: float | None = None,
    extra: Mapping[str, Mapping[str, float | str | None]] | None = None,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
) -> list[Measurement]:
    """Time contenders in turns.

    Args:
        case: name of what they all do.
        contenders: name to function.
        baseline: the contender that ratios are relative to.
        rounds: how often each has its turn.
        warmup: turns before the first that counts.
        min_seconds: a turn repeats its function until about this long, so that the clock's grain does not matter.
        items: work items per call.
        extra: further columns per contender.
        synchronize: called before each clock reading (``torch.cuda.synchronize``).
        clock: wall clock in seconds.
        cpu_clock: CPU seconds of this process, all threads.

    Raises:
        UserError: if ``baseline`` is no contender.
    """
    if baseline not in contenders:
        raise UserError(f"baseline {baseline!r} is not among the contenders: {', '.join(contenders)}")
    wait = synchronize or (lambda: None)
    repeats = {}
    for name, function in contenders.items():
        for _ in range(max(warmup, 1)):
            wait()
            start = clock()
            function()
            wait()
            took = clock() - start
        repeats[name] = max(1, round(min_seconds / max(took, 1e-9)))
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            # Each round begins with the next one: nobody is always first, and all wait equally long between two turns,
            # in which caches and pages go cold.
            names = list(contenders)
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                wait()
                start, cpu_start = clock(), cpu_clock()
                for _ in range(repeats[name]):
                    contenders[name]()
                wait()
                wall[name].append((clock() - start) / repeats[name])
                cpu[name].append((cpu_clock() - cpu_start) / repeats[name])
    finally:
        if collecting:
            gc.enable()
    return [
        Measurement(
            case,
            name,
            baseline,
            Spread.from_values(wall[name]),
            Spread.from_values(cpu[name]),
            Spread.from_values([b / max(a, 1e-12) for a, b in zip(wall[name], wall[baseline])]),
            Spread.from_values([b / max(a, 1e-12) for a, b in zip(cpu[name], cpu[baseline])]),
            items,
            dict((extra or {}).get(name, {})),
        )
        for name in contenders
    ]


@dataclass(frozen=True)
class Unmeasured:
    """A contender of a case that was not measured, and why: a row of the report all the same."""

    case: str
    name: str
    reason: str
    extra: Mapping[str, float | str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Breakdown:
    """The parts of a duration: seconds by part, in the order in which they are shown."""

    title: str
    parts: Mapping[str, Spread]

    def rows(self) -> list[list[str]]:
        """Header, then per part: name, share of the medians' sum, milliseconds, quartiles."""
        total = sum(part.median for part in self.parts.values()) or 1.0
        return [
            [self.title, "share", "ms", "quartiles"],
            *(
                [name, f"{100 * s.median / total:.1f}%", _digits(s.median * 1e3), _quartiles(s)]
                for name, s in self.parts.items()
            ),
        ]


@dataclass
class BenchReport:
    """Measurements with what is needed to judge them: command, date, device, threads, versions."""

    title: str
    measurements: list[Measurement]
    item: str = "item"
    """What ``Measurement.items`` counts, in the singular."""
    notes: list[str] = field(default_factory=list)
    command: str = field(default_factory=lambda: _command())
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
    machine: dict[str, str] = field(default_factory=lambda: describe_machine())
    breakdowns: list[Breakdown] = field(default_factory=list)
    unmeasured: list[Unmeasured] = field(default_factory=list)

    def as_json(self) -> str:
        """Everything, times in seconds."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def _columns(self) -> tuple[list[str], list[list[str]]]:
        all_rows: list[Measurement | Unmeasured] = [*self.measurements, *self.unmeasured]
        cases = list(dict.fromkeys(row.case for row in all_rows))
        extras = list(dict.fromkeys(key for row in all_rows for key in row.extra))
        throughput = any(m.items is not None for m in self.measurements)
        header = ["case", "contender", "ratio (quartiles)", "ratio by CPU time", "ms", "quartiles", "CPU ms"]
        header += [f"{self.item}s/s"] * throughput + extras
        rows = []
        for m in sorted(all_rows, key=lambda row: cases.index(row.case)):
            cells = ["" if m.extra.get(key) is None else _cell(m.extra[key]) for key in extras]
            if isinstance(m, Unmeasured):
                rows.append([m.case, m.name, f"not measured: {m.reason}", *[""] * (4 + throughput), *cells])
                continue
            row = [
                m.case,
                m.name,
                "1 (baseline)" if m.name == m.baseline else m.shown_ratio,
                "" if m.name == m.baseline else f"{m.cpu_ratio.median:.2f}x",
                _digits(m.wall.median * 1e3),
                _quartiles(m.wall),
                _digits(m.cpu.median * 1e3),
            ]
            if throughput:
                row.append("" if m.throughput is None else _digits(m.throughput))
            rows.append([*row, *cells])
        return header, rows

    def as_text(self) -> str:
        """For a terminal."""
        header, rows = self._columns()
        lines = [self.title, *(f"{key}: {value}" for key, value in self.machine.items()), ""]
        previous, shown = "", []
        for row in [header, *rows]:
            shown.append([row[0] if row[0] != previous else "", *row[1:]])
            previous = row[0]
        lines += columns(shown)
        for breakdown in self.breakdowns:
            lines += ["", *columns(breakdown.rows())]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes]) + "\n"

    def as_markdown(self) -> str:
        """A page for ``docs/benchmarks``."""
        header, rows = self._columns()
        lines = [f"# {self.title}", "", "```", self.command, "```", "", f"Run on {self.date}."]
        lines += ["", *(f"- {key}: {value}" for key, value in self.machine.items())]
        lines += [
            "",
            "Contenders take turns in one process. A ratio above 1 is faster than the baseline of its case: the median over "
            "turns, with quartiles; the CPU columns are process CPU time over all threads.",
            "",
            *_table([header, *rows]),
        ]
        for breakdown in self.breakdowns:
            lines += ["", *_table(breakdown.rows())]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes]) + "\n"

    def picture(self, path: Path) -> None:
        """Ratios to the baseline as bars with quartiles, then a bar of its parts per breakdown; PNG or what the suffix says."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.patches import Rectangle

        cases = list(dict.fromkeys(m.case for m in self.measurements))
        names = list(dict.fromkeys(m.name for m in self.measurements))
        colours = dict(zip(names, plt.get_cmap("tab10").colors * (1 + len(names) // 10)))  # type: ignore[attr-defined]
        heights = [1.2 + 0.3 * len(self.measurements), *(1.1 for _ in self.breakdowns)]
        figure, panels = plt.subplots(
            len(heights),
            squeeze=False,
            height_ratios=heights,
            figsize=(9, sum(heights)),
            layout="constrained",
        )
        axes = panels[0, 0]
        place, ticks = 0.0, []
        for case in cases:
            members = [m for m in self.measurements if m.case == case]
            ticks.append((place + (len(members) - 1) / 2, case))
            for m in members:
                error = [[m.ratio.median - m.ratio.low], [m.ratio.high - m.ratio.median]]
                axes.barh(place, m.ratio.median, height=0.85, color=colours[m.name], xerr=error, ecolor="0.3")
                axes.text(m.ratio.high, place, f" {m.ratio.median:.2f}x", va="center", fontsize=8)
                place += 1
            place += 0.7
        axes.set_yticks([at for at, _ in ticks], [case for _, case in ticks], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_xlabel("times the baseline's speed (bars: median, whiskers: quartiles)")
        axes.set_title(f"{self.title}\n{self.machine.get('device', '')}, {self.date}", fontsize=9)
        handles = [Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
        axes.legend(handles, names, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        for panel, breakdown in zip(panels[1:, 0], self.breakdowns):
            _draw_parts(panel, breakdown)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_parts(axes: Any, breakdown: Breakdown) -> None:
    """One bar of shares, its legend beneath."""
    total = sum(part.median for part in breakdown.parts.values()) or 1.0
    left = 0.0
    for name, part in breakdown.parts.items():
        share = 100 * part.median / total
        axes.barh(0, share, left=left, label=f"{name} {share:.1f}%")
        left += share
    axes.set_xlim(0, 100)
    axes.set_yticks([])
    axes.set_xlabel("% of the time", fontsize=8)
    axes.set_title(breakdown.title, fontsize=9)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.9), frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Device, threads and versions, as a report states them."""
    facts = {"device": _cpu_name(), "python": platform.python_version()}
    torch = sys.modules.get("torch")
    if torch is not None:
        if device.startswith("cuda"):
            facts["device"] = torch.cuda.get_device_name(device)
        facts["threads"] = str(torch.get_num_threads())
        facts["torch"] = torch.__version__
    return facts


def _cpu_name() -> str:
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} cores"


def _command() -> str:
    return shlex.join(["dattrain", *sys.argv[1:]])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return [header, "|" + "---|" * len(rows[0]), *rest]


def _quartiles(seconds: Spread) -> str:
    return f"{_digits(seconds.low * 1e3)}-{_digits(seconds.high * 1e3)}"


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _cell(value: Any) -> str:
    return _digits(value) if isinstance(value, float) else str(value)
