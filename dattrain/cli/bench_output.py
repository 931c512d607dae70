"""What every ``dattrain bench`` has in common on the command line: how often, and where the report goes."""

from __future__ import annotations

import argparse
from pathlib import Path

from dattrain.bench.common import BenchReport
from dattrain.cli.arguments import positive
from dattrain.errors import UserError


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """``--json``, ``--picture``, ``--markdown``, ``--rounds``."""
    parser.add_argument(
        "--rounds", type=positive, default=9, metavar="N", help="turns of each contender (default 9)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios (.png, .svg, .pdf)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page for docs/benchmarks")


def emit(report: BenchReport, args: argparse.Namespace) -> None:
    """Print the report and write the files that were asked for."""
    print(report.as_text())
    for path, write in (
        (args.json, lambda p: p.write_text(report.as_json())),
        (args.markdown, lambda p: p.write_text(report.as_markdown())),
        (args.picture, report.picture),
    ):
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {error}") from error
        print(f"wrote {path}")
