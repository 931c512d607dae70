"""``dattrain logs``: what a run's ranks wrote, over all of its restarts."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("folder", metavar="RUN", help="run folder")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="print what is appended, until the run is over"
    )
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="of which rank (0)")
    parser.add_argument(
        "-n", "--lines", type=int, default=200, metavar="N", help="last lines to begin with (200); 0 for all"
    )
    parser.add_argument(
        "--job", action="store_true",
        help="what Slurm and the batch script wrote (errors before training, srun's messages, the job hook)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit code 0."""
    import json
    import sys
    import time
    from pathlib import Path

    from dattrain.errors import UserError
    from dattrain.submit import run_status

    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")

    def files() -> list[Path]:
        own = folder / "logs" / f"rank_{args.rank}.log"
        if own.is_file() and not args.job:
            return [own]
        spec = folder / "submit" / "spec.json"
        begun = any((folder / "logs").glob("rank_*.log"))
        if not spec.is_file() or (begun and not args.job):
            return []
        output = Path(json.loads(spec.read_text(encoding="utf-8"))["folder"])
        from dattrain.submit.history import history

        jobs = dict.fromkeys(e["job"] for e in history(folder) if e["event"] in ("submit", "begin"))
        # Where a job ended before any rank began, the batch script has said why: in the files of rank 0.
        ranks = dict.fromkeys([args.rank] if args.job else [0, args.rank])
        listed = [output / f"{job}_{r}_log.{end}" for job in jobs for r in ranks for end in ("out", "err")]
        return [path for path in [*listed, folder / "submit" / "local.log"] if path.is_file()]

    found = files()
    if not found and not args.follow:
        ranks = sorted(path.stem.removeprefix("rank_") for path in (folder / "logs").glob("rank_*.log"))
        raise UserError(
            f"{folder}: nothing written by rank {args.rank} yet; ranks with logs: {', '.join(ranks) or 'none'}"
        )
    at: dict[Path, int] = {}
    for path in found:
        data = path.read_bytes()
        kept = data.splitlines(keepends=True)[-args.lines :] if args.lines else [data]
        sys.stdout.write(b"".join(kept).decode(errors="replace"))
        at[path] = len(data)
    asked, over = 0.0, False
    while args.follow:
        sys.stdout.flush()
        if time.monotonic() - asked > 10:
            # Seldom: each time is a question to Slurm's controller.
            over, asked = run_status.active_job(folder) == (None, ""), time.monotonic()
        for path in files():
            with open(path, "rb") as file:
                file.seek(at.get(path, 0))
                data = file.read()
            at[path] = at.get(path, 0) + len(data)
            sys.stdout.write(data.decode(errors="replace"))
        if over:
            break
        time.sleep(1)
    return 0
