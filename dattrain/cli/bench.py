"""``dattrain bench``: measurements side by side in one run. A subverb's module is imported when the subverb is named."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

SUBVERBS: dict[str, tuple[str, str]] = {
    "attention": (
        "dattrain.cli.bench_attention",
        "the deformable core: every backend against plain formulations",
    ),
    "model": ("dattrain.cli.bench_model", "whole models, training and inference, against timm's by name"),
    "step": (
        "dattrain.cli.bench_step",
        "an update of a recipe: recomputation, compile, precision side by side, and its parts",
    ),
    "data": ("dattrain.cli.bench_data", "the input pipeline: images/s of readers and decoders"),
    "checkpoint": ("dattrain.cli.bench_checkpoint", "saving, verifying and loading a run's state"),
}


class _LazyParser(argparse.ArgumentParser):
    """A subparser whose module adds the arguments when it is about to parse."""

    def __init__(self, *args: Any, module: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._module = module

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._module:
            loaded, self._module = importlib.import_module(self._module), ""
            loaded.add_arguments(self)
            self.set_defaults(run_bench=loaded.run)
        return super().parse_known_args(args, namespace)

    parse_known_intermixed_args = parse_known_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subparser per subverb."""
    subverbs = parser.add_subparsers(dest="subverb", metavar="WHAT", required=True, parser_class=_LazyParser)
    for name, (module, text) in SUBVERBS.items():
        subverbs.add_parser(name, module=module, help=text, description=text[0].upper() + text[1:] + ".")


def run(args: argparse.Namespace) -> int:
    """Run the subverb; returns the exit code."""
    code: int = args.run_bench(args)
    return code
