"""``dattrain init``: a recipe for one's own images as a file, each value with its reason, to be changed and trained."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dattrain.cli.loading import loading
from dattrain.errors import UserError

FILE = "recipe.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    from dattrain.cli import own_images

    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(), metavar="DIR", help=f"where {FILE} goes (default: here)"
    )  # fmt: skip
    own_images.add_data_argument(parser)
    parser.add_argument("--model", metavar="NAME", help="e.g. dat_small (default: by the device)")
    parser.add_argument("--weights", metavar="WEIGHTS", help="what it fine-tunes, as of `dattrain finetune`")


def run(args: argparse.Namespace) -> int:
    """Write the recipe, and beside it what it names (lists of what is held out, weights); refuses to overwrite."""
    from dattrain.cli import own_images

    with loading("torch"):
        from dattrain.config.load import flatten
        from dattrain.data.prepare.own_images import find
        from dattrain.pretrained.start_from import Start

    folder: Path = args.folder
    file = folder / FILE
    machine = own_images.this_machine(1)
    given = {} if args.model is None else {"model.name": args.model}
    if args.data is None:
        if args.weights is not None:
            raise UserError("--weights needs --data: what fits depends on the classes", exit_code=2)
        _refuse_existing(file)
        _write(file, f"dattrain train {file} --data FOLDER", *_for_any(machine, given))
        return 0
    start = None if args.weights is None else Start(args.weights)
    own = find(args.data)
    lists = map(Path, own_images.splits(own, folder)) if own.held_out else ()
    _refuse_existing(file, *lists)
    settled = own_images.settle(
        own, folder, machine, name=own_images.name_of(args.data, start), start=start,
        overrides=[f"{key}={value}" for key, value in given.items()],
    )  # fmt: skip
    values = flatten(settled.config)
    own_images.write_beside(own, folder, start)
    _write(file, f"dattrain train {file}", {key: values[key] for key in settled.reasons}, settled.reasons)
    return 0


def _for_any(machine: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and reasons for a thousand images, without what the images alone tell."""
    from dattrain.cli import own_images
    from dattrain.config.choose import GIVEN, Images, choose

    chosen = choose(Images(train=1000, val=100, classes=2, side=224), machine, given=given)
    del chosen["model.num_classes"]
    reasons = {
        key: own_images.ON_COMMAND_LINE if choice.reason == GIVEN else choice.reason
        for key, choice in chosen.items()
    }
    return {key: choice.value for key, choice in chosen.items()}, reasons


def _refuse_existing(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise UserError(f"{file}: exists; choose another DIR, or remove it")


def _write(file: Path, command: str, values: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    import yaml

    from dattrain.cli import own_images
    from dattrain.config.comments import annotate
    from dattrain.files import write_text

    text = yaml.safe_dump(own_images.nested(values), sort_keys=False, width=110)
    head = (
        f"# {command}\n"
        "# What is not here has its default (docs/keys.md); key=value on the command line goes over both.\n"
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, head + annotate(text, reasons))
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    print(f"{file}: {len(values)} settings, each with its reason. Next: {command}")
