"""``dattrain config list|show|diff|keys``: recipes by name, resolved with the origin of each value, and the difference of two."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING

from dattrain.errors import ConfigError
from dattrain.urls import mask

if TYPE_CHECKING:
    from dattrain.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser(
        "list", help="the recipes and chains that are shipped, by the names that they are asked for"
    )
    one = actions.add_parser("show", help="every value and where it came from")
    one.add_argument("config", metavar="CONFIG|RUN")
    one.add_argument("overrides", nargs="*", metavar="key=value")
    one.add_argument("--yaml", action="store_true", help="plain YAML, ready to be saved")
    keys = actions.add_parser(
        "keys", help="every key with its type, default and meaning, as Markdown; or those of a FILTER"
    )
    keys.add_argument(
        "filter", nargs="?", metavar="FILTER", help="a part of a key or of its meaning, e.g. mixup"
    )
    two = actions.add_parser("diff", help="keys whose values differ")
    two.add_argument("a", metavar="A")
    two.add_argument("b", metavar="B")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; ``diff`` gives 1 where something differs, as diff(1) does."""
    from dattrain.config import reference
    from dattrain.config.load import diff, dump, load, show

    if args.action == "list":
        print(_list(), end="")
        return 0
    if args.action == "keys":
        if args.filter is None:
            print(reference.markdown(), end="")
            return 0
        found = reference.find(args.filter)
        if not found:
            raise ConfigError(
                f"no key of a recipe has to do with {args.filter!r}; dattrain config keys lists all"
            )
        print(reference.listing(found), end="")
        return 0
    if args.action == "show":
        loaded = load(args.config, args.overrides)
        text = dump(loaded.config).rstrip() if args.yaml else show(loaded)
        print(mask(text))
        if not args.yaml:
            print(_batch(loaded.config))
        if args.yaml and mask(text) != text:
            print("credentials in URLs are shown as ***: put them back to use this", file=sys.stderr)
        return 0
    rows = diff(load(args.a), load(args.b))
    for key, left, right in rows:
        print(mask(f"{key}\n  A: {left}\n  B: {right}"))
    return 1 if rows else 0


def _batch(config: Config) -> str:
    """What follows for one device, as a comment."""
    from dattrain.config.derive import derive

    train = config.train
    d = derive(config, world=1, samples_per_epoch=train.global_batch)
    most = (
        "as many at a time as fit"
        if train.micro_batch == "auto"
        else f"{d.micro_batch} at a time, {d.accumulation} times"
    )
    return f"# on one device: train.global_batch={train.global_batch} is taken {most}; peak learning rate {d.peak_lr:g}"


def _list() -> str:
    """Recipes by folder with the first sentence of their descriptions; chains; and where all of them lie."""
    import yaml

    from dattrain.config.shipped import CHAINS, RECIPES, names

    lines = []
    for folder in (RECIPES, CHAINS):
        for name, path in names(folder).items():
            text = yaml.safe_load(path.read_text(encoding="utf-8"))
            if "name" in text:  # what others extend alone has none
                about = re.split(r"(?<=\.) ", " ".join(text.get("description", "").split()))[0]
                lines.append(f"{name:44}{about}")
    lines += ["", f"dattrain train NAME ...     the recipes: {RECIPES.resolve()}"]
    lines += [f"dattrain submit NAME ...    the chains: {CHAINS.resolve()}"]
    return "\n".join(lines) + "\n"
