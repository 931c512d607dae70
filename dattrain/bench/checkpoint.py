"""What a save costs the step loop, and how near to the disk's own speed it writes and reads.

Bars: a background save stalls the loop for less than a tenth of a blocking one, and a save moves at least 70% of the bytes
per second that bare writers of the same number, in the same run, get out of the same disk.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dattrain.bench.common import BenchReport, Measurement, Spread
from dattrain.errors import UserError
from dattrain.runtime.spawn import launch

STALL_BAR, BANDWIDTH_BAR = 0.10, 0.70
Seconds = list[tuple[float, float]]


def bench(
    folder: Path, *, parameters: int, ranks: int, load_ranks: Sequence[int], stage: int, rounds: int
) -> BenchReport:
    """Time saves and loads by real ranks.

    Args:
        folder: where to write, on the disk to be measured; needs three times the state.
        parameters: of the model; 12 bytes each are saved.
        ranks: local ranks that save.
        load_ranks: local ranks that load, one turn for each number.
        stage: ZeRO stage.
        rounds: turns of each contender.

    Raises:
        UserError: ranks that failed.
    """
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=folder) as made:

        def result(mode: str, ranks: int) -> dict[str, Any]:
            out, job = Path(made) / f"{mode}-{ranks}.json", Path(made) / "job.json"
            content = {"mode": mode, "folder": made, "out": str(out)}
            job.write_text(
                json.dumps({**content, "parameters": parameters, "stage": stage, "rounds": rounds})
            )
            code = launch([sys.executable, "-m", "dattrain.bench.checkpoint_ranks", str(job)], ranks)
            if code:
                raise UserError(f"the ranks of {mode} ended with exit code {code}; what they said is above")
            found: dict[str, Any] = json.loads(out.read_text())
            return found

        saved = result("save", ranks)
        loaded = {n: result("load", n) for n in load_ranks}
    return _report(ranks, stage, saved, loaded)


def _report(ranks: int, stage: int, saved: dict[str, Any], loaded: dict[int, dict[str, Any]]) -> BenchReport:
    size = saved["bytes"]
    # The disk's own speed is that of whichever bare writer was faster in the round.
    bare = [min(turns) for turns in zip(saved["dd"], saved["direct"], saved["buffered"])]
    rows = [
        *_case(
            f"step loop waits ({ranks} ranks)",
            {"blocking save": saved["blocking"], "background save": saved["stall"]},
        ),
        *_case(
            f"update beside it ({ranks} ranks)",
            {"no save": saved["update"], "background save": saved["beside"]},
        ),
        *_case(
            f"state to disk ({ranks} ranks)",
            {
                "disk alone (best of these)": bare,
                "one writer, unbuffered": saved["dd"],
                "a writer per rank, unbuffered": saved["direct"],
                "a writer per rank, buffered": saved["buffered"],
                "blocking save": saved["blocking"],
                "background save": saved["background"],
            },
            size,
            {"blocking save": saved["peak_bytes"]},
        ),
    ]
    for n, result in loaded.items():
        rows += _case(
            f"load on {n} ranks",
            {
                "bare read": result["read"],
                "load, checked": result["checked"],
                "load, unchecked": result["unchecked"],
            },
            result["bytes"],
            {"load, checked": result["peak_bytes"]},
        )
    stall = Spread.from_values([b[0] / a[0] for a, b in zip(saved["blocking"], saved["stall"])])
    slowdown = [b[0] - a[0] for a, b in zip(saved["update"], saved["beside"])]
    beside = Spread.from_values(slowdown)
    beside_share = Spread.from_values([d / b[0] for d, b in zip(slowdown, saved["blocking"])])
    share = Spread.from_values([b[0] / a[0] for a, b in zip(saved["background"], bare)])
    blocking = Spread.from_values([b[0] / a[0] for a, b in zip(saved["blocking"], bare)])
    dd = Spread.from_values([b[0] / a[0] for a, b in zip(saved["background"], saved["dd"])])
    notes = [
        f"{saved['parameters'] / 1e6:.0f} M parameters, {size / 1e9:.2f} GB (weights and two moments, fp32), ZeRO stage {stage}, "
        f"{ranks} local ranks on {saved['device']}.",
        f"Stall: {stall.median:.1%} of a blocking save (quartiles {stall.low:.1%}-{stall.high:.1%}); "
        f"bar: under {STALL_BAR:.0%}: {'met' if stall.median < STALL_BAR else 'MISSED'}.",
        "That is the call and the wait before the optimizer's step; between them the state is copied to host memory. "
        f"The update beside copy and write takes {beside.median * 1e3:+.0f} ms longer (quartiles {beside.low * 1e3:+.0f} to "
        f"{beside.high * 1e3:+.0f}), {beside_share.median:.0%} of a blocking save: where ranks have no cores to spare, they pay for both.",
        f"Bandwidth: {share.median:.0%} of the disk's own in background (quartiles {share.low:.0%}-{share.high:.0%}), {blocking.median:.0%} "
        f"blocking; bar: at least {BANDWIDTH_BAR:.0%}: {'met' if share.median >= BANDWIDTH_BAR else 'MISSED'}. "
        f"Of one dd's: {dd.median:.0%}.",
        "The disk's own speed is that of bare writers of as many bytes, ending with fsync: one (as dd with oflag=direct conv=fsync), one "
        "per rank, or one per rank through the page cache, whichever was fastest in the round. A save is "
        "everything from the call to the published folder; a load is everything up to weights that the forward pass can use.",
        "Peaks are resident memory above the engine's, of the largest rank. A save holds a rank's shard "
        f"({saved['shard_bytes'] / 1e6:.0f} MB) once, in the host buffer. A load's is that of the reading.",
        *(
            f"DeepSpeed's gather of the weights after a load took {r['refresh_bytes'] / 1e6:.0f} MB on {n} ranks."
            for n, r in loaded.items()
        ),
    ]
    return BenchReport("Saving and loading a run's state", rows, item="MB", notes=notes)


def _case(
    case: str, seconds: dict[str, Seconds], size: int | None = None, peaks: Mapping[str, float] = {}
) -> list[Measurement]:
    baseline = next(iter(seconds))
    first = seconds[baseline]
    return [
        Measurement(
            case,
            name,
            baseline,
            Spread.from_values([wall for wall, _ in turns]),
            Spread.from_values([cpu for _, cpu in turns]),
            Spread.from_values([a[0] / max(b[0], 1e-9) for a, b in zip(first, turns)]),
            Spread.from_values([a[1] / max(b[1], 1e-9) for a, b in zip(first, turns)]),
            None if size is None else size / 1e6,
            {"peak MB": peaks[name] / 1e6} if name in peaks else {},
        )
        for name, turns in seconds.items()
    ]
