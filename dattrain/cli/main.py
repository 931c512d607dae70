"""The command line: verbs to functions. A verb's module is imported when the verb runs, so help never loads torch."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

from dattrain import __version__
from dattrain.cli import suggest
from dattrain.errors import UserError
from dattrain.text import styled
from dattrain.urls import mask

VERBS: dict[str, tuple[str, str]] = {
    "train": ("dattrain.cli.train", "train a recipe or a folder of images, or resume a run folder"),
    "finetune": ("dattrain.cli.finetune", "train weights further on a folder of images"),
    "init": ("dattrain.cli.init", "write a commented recipe for a folder of images"),
    "eval": ("dattrain.cli.eval", "accuracy, mIoU or AP, and more, of a run or checkpoint"),
    "report": (
        "dattrain.cli.report",
        "one page of a run, or of several: curves, time line, images, settings",
    ),
    "predict": ("dattrain.cli.predict", "classes of images or of their pixels, or the objects in them"),
    "viz": ("dattrain.cli.viz", "draw sampling points, offsets and attention on images"),
    "data": ("dattrain.cli.data", "pack, verify, index, list and describe shards"),
    "ckpt": ("dattrain.cli.ckpt", "list, inspect, verify, import, prune and export checkpoints"),
    "import": ("dattrain.cli.import_", "read weights that the authors released"),
    "export": ("dattrain.cli.export", "write weights for other programs"),
    "submit": ("dattrain.cli.submit", "submit a recipe or a chain to Slurm, or to this machine"),
    "status": ("dattrain.cli.status", "state, speed and restarts of runs"),
    "logs": ("dattrain.cli.logs", "show a run's logs"),
    "cancel": ("dattrain.cli.cancel", "cancel a run's jobs"),
    "stop": ("dattrain.cli.stop", "save at the next step boundary, then stop"),
    "plan": ("dattrain.cli.plan", "memory, time and data rate before anything is queued"),
    "lr-find": ("dattrain.cli.lr_find", "a learning-rate range test of a recipe"),
    "bench": ("dattrain.cli.bench", "side-by-side measurements: attention, model, step, data, checkpoint"),
    "config": ("dattrain.cli.config", "list the recipes, show a resolved one, or the difference of two"),
    "demo": (
        "dattrain.cli.demo",
        "train and evaluate on Fashion-MNIST, classes, segmentation or detection, in minutes on a laptop",
    ),
    "doctor": ("dattrain.cli.doctor", "what this machine has, and whether it works"),
    "completion": ("dattrain.cli.completion", "what Tab completes in bash, zsh or fish"),
}


class _Parser(argparse.ArgumentParser):
    """Shows no secrets of URLs; the parsers of verbs are of this class too."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, styled(f"{self.prog}: error: ", "error", sys.stderr) + mask(message) + "\n")


def _bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints what Python would, without the secrets of URLs."""
    print(mask("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 (a user error while running), 2 (usage or configuration)."""
    if argv is None:
        sys.excepthook = _bug
        # Names of files need not be UTF-8; stderr shows such bytes so by itself.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="dattrain", description="Pre-train and fine-tune DAT at ImageNet-22K scale.")
    parser.add_argument("--version", action="version", version=f"dattrain {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    asked = next((word for word in argv if not word.startswith("-")), None)
    if asked is not None and asked not in VERBS and argv[0] == asked:
        parser.error(suggest.verb(asked, VERBS))
    for verb, (module, help_text) in VERBS.items():
        sub = verbs.add_parser(verb, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        if verb == asked:
            loaded = importlib.import_module(module)
            loaded.add_arguments(sub)
            sub.set_defaults(run=loaded.run)
            if message := suggest.unknown_option(argv[argv.index(verb) + 1 :], verb, sub):
                sub.error(message)
    args, rest = parser.parse_known_args(argv)
    # argparse takes only the first run of positionals; options may stand before a recipe and between our overrides.
    if getattr(args, "config", "") is None:
        bare = [word for word in rest if not word.startswith("-") and "=" not in word]
        if bare:
            args.config = bare[0]
            rest.remove(bare[0])
    ours = hasattr(args, "overrides") and all(
        re.fullmatch(r"[A-Za-z_][\w.]*=.*", word, re.DOTALL) for word in rest
    )
    if ours:
        args.overrides = [*args.overrides, *rest]
    elif rest:
        verbs.choices[args.verb].error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code: int = args.run(args)
        return code
    except UserError as error:
        print(styled(f"dattrain {args.verb}: ", "error", sys.stderr) + str(error), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) has gone; point stdout elsewhere so that the interpreter's flush at exit is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"dattrain {args.verb}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
