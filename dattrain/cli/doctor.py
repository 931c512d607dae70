"""``dattrain doctor``: what this machine has, and whether it works. Alone, or as ranks (torchrun, srun, ``--nproc``)."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dattrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--nproc", type=int, help="check an all-reduce over so many local ranks (default: those found)"
    )
    parser.add_argument("--folder", type=Path, help="the shared folder to check (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")


def run(args: argparse.Namespace) -> int:
    """Check and print; returns 1 where something that training needs does not work."""
    if args.nproc is not None and "RANK" not in os.environ:
        return _as_ranks(args)
    from dattrain.planning import machine
    from dattrain.runtime import environment

    env = environment.resolve(os.environ)
    found: dict[str, Any] = {}
    failed = []
    checks: list[tuple[str, Callable[[], Any]]] = [("ranks", lambda: machine.ranks(env, args.folder))]
    if env.rank == 0:
        checks = [
            ("versions", machine.versions),
            ("devices", machine.devices),
            *checks,
            ("attention", machine.attention),
            ("DALI", machine.dali),
            ("Slurm", machine.slurm),
            ("disk", lambda: machine.disk(args.folder)),
        ]
    for name, check in checks:
        try:
            found[name] = check()
        except (UserError, OSError, RuntimeError, ImportError) as error:
            found[name] = f"FAILED: {error}"
            failed.append(name)
        if env.rank == 0:
            _print(name, found[name])
    if env.rank == 0 and args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if env.rank == 0:
        print(f"\n{'problems: ' + ', '.join(failed) if failed else 'all well'}", flush=True)
    if env.world > 1:
        environment.hard_exit(1 if failed else 0)
    return 1 if failed else 0


def _as_ranks(args: argparse.Namespace) -> int:
    from dattrain.runtime.spawn import launch

    with tempfile.TemporaryDirectory() as shared:
        command = [sys.executable, "-m", "dattrain", "doctor", "--folder", str(args.folder or shared)]
        return launch([*command, *(["--json", str(args.json)] if args.json else [])], args.nproc)


def _print(name: str, value: Any) -> None:
    lines = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else value
    for number, line in enumerate(lines if isinstance(lines, list) else [lines]):
        print(f"{name if number == 0 else '':10} {line}", flush=True)
