"""``python -m benchmarks.gpu --out DIR --minutes N [--only STAGES]``: see docs/benchmarks/gpu.md."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import bars, runner
from benchmarks.gpu.stages import STAGES, Stage
from dattrain.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    names = "; ".join(f"{s.name} ({s.seconds} s): {s.about}" for s in STAGES)
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Ask a GPU everything that this project wants to know, in stages that each have a process and a limit.",
        epilog=f"stages: {names}",
    )
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results.json, log.txt and table.txt go there"
    )
    p.add_argument(
        "--minutes",
        type=_minutes,
        default=60.0,
        metavar="N",
        help="start no stage whose limit does not fit in (60)",
    )
    p.add_argument("--only", nargs="+", metavar="STAGE", help="these alone, in their fixed order")
    p.add_argument(
        "--again", action="store_true", help="also what ran before at this commit, failed stages too"
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="walk every stage on the CPU with tiny sizes; none of its figures counts",
    )
    return p


def _minutes(word: str) -> float:
    minutes = float(word)
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is not a number of minutes above 0")
    return minutes


def chosen(only: Sequence[str] | None) -> list[Stage]:
    """The stages asked for, in order. Names may be joined by commas.

    Raises:
        UserError: there is no such stage.
    """
    names = [name for word in only or [] for name in word.split(",") if name]
    known = [stage.name for stage in STAGES]
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such stage; there are {', '.join(known)}", exit_code=2)
    return [stage for stage in STAGES if not names or stage.name in names]


def device_name() -> str:
    """The GPU, asked in a child: this process must not hold memory of it.

    Raises:
        UserError: torch sees none.
    """
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    name = done.stdout.strip()
    if done.returncode or not name:
        why = f": {done.stderr.strip().splitlines()[-1]}" if done.returncode and done.stderr.strip() else ""
        raise UserError(f"torch sees no CUDA device here{why}; --dry-run walks the stages without one")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is due; 1 where a stage that was asked for failed or missed a bar, else 0."""
    args = parser().parse_args(argv)
    begin = time.monotonic()
    try:
        stages = chosen(args.only)
        name = "cpu" if args.dry_run else device_name()
        args.out.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"benchmarks.gpu: --out {args.out}: no folder to write to ({error.strerror})", file=sys.stderr)
        return 2
    # A stage has a session of its own and would outlive this process: whoever ends it ends the stage first, as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    out = args.out.resolve()
    key = {"commit": runner.revision(), "device": name, "dry": args.dry_run}
    path = out / "results.json"
    runner.put_aside(path, key)
    entries = runner.finished(runner.load(path), key)
    print(f"commit: {key['commit']}\ndevice: {name}", flush=True)
    interrupted = False
    try:
        with open(out / "log.txt", "ab") as log:
            for stage in stages:
                if stage.name in entries and not args.again:
                    print(f"{stage.name}: {entries[stage.name]['status']}, done before", flush=True)
                    continue
                left = 60 * args.minutes - (time.monotonic() - begin)
                if left >= stage.seconds:
                    print(f"{stage.name}: {stage.about} ...", flush=True)
                    entries[stage.name] = runner.run_stage(
                        stage, out, "cpu" if args.dry_run else "cuda", key, log
                    )
                elif stage.name in entries:
                    print(f"{stage.name}: no time to run it again", flush=True)
                else:
                    entries[stage.name] = runner.late(stage, key, left)
                found = entries[stage.name]
                print(f"{stage.name}: {found['status']} {found['reason']} ({found['seconds']} s)", flush=True)
                runner.write(path, key, in_order(entries))
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; what was done is kept, and the next call resumes", flush=True)
    shown = in_order(entries)
    text = bars.table(shown, dry=args.dry_run)
    (out / "table.txt").write_text(text, encoding="utf-8")
    print("\n" + text)
    if interrupted:
        return 130
    return int(any(entries[stage.name]["status"] in ("failed", "missed") for stage in stages))


def in_order(entries: dict[str, Any]) -> list[Any]:
    """Entries in the order of the stages."""
    return [entries[stage.name] for stage in STAGES if stage.name in entries]


if __name__ == "__main__":
    sys.exit(main())
