"""What a stage sees of the command."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

NOT_RUN = 77
"""Exit code of a stage that cannot be run here, as automake's tests have it."""


class NotRun(Exception):
    """The stage cannot be run here; says why."""


@dataclass
class Job:
    """One run of a stage.

    Attributes:
        device: ``cuda``, or ``cpu`` in a dry run, where sizes are tiny.
        folder: for whatever the stage writes.
        lines: where figures are written, one JSON object a line, so that a stage which is killed leaves what it had.
        seconds: the limit of the process.
    """

    stage: str
    module: str
    function: str
    device: str
    folder: Path
    lines: Path
    seconds: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def dry(self) -> bool:
        """Whether only the code is walked."""
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds until the limit, but for a tenth that is kept for the end."""
        return 0.9 * self.seconds - (time.monotonic() - self.begin)

    def figure(self, name: str, value: float | str, unit: str = "") -> None:
        """Write a figure down."""
        with open(self.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps({"figure": name, "value": value, "unit": unit}) + "\n")
        print(f"{self.stage}: {name}: {value} {unit}".rstrip(), flush=True)
