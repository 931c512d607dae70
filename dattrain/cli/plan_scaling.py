"""What ``dattrain plan --scaling`` takes and prints: a table of numbers of devices, estimated by a model."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dattrain.errors import ConfigError

if TYPE_CHECKING:
    from dattrain.planning.scaling import Constants

NAMES = {
    "micro_batch": "train.micro_batch",
    "stage": "zero.stage",
    "bucket": "zero.extra.reduce_bucket_size",
}
"""Settings by the names that ``planning.scaling`` has for them."""
SHARES = ("backward_share", "net_achieved")
"""Constants that are parts of something, 1 at most."""
FACTOR = 1000.0
"""By which a constant may differ from its default: beyond it is another unit or a slip."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the estimate."""
    parser.add_argument(
        "--scaling", metavar="N,N,...", help="also estimate an update on so many devices (8,16,32,64,128,256,512,1024)"
    )  # fmt: skip
    parser.add_argument(
        "--device-rates", metavar="M:X,...",
        help="for --scaling: images/s of one device by micro-batch, measured (32:610,128:1050); without it an H100 is assumed",
    )  # fmt: skip
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=X",
        help="for --scaling: another value for one of the constants that it lists",
    )  # fmt: skip


def asked(args: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments as those of ``scaling_table.table``; None without ``--scaling``.

    Raises:
        ConfigError: one of them is not what it should be, or goes with ``--scaling`` alone.
    """
    if args.scaling is None:
        if args.assume or args.device_rates is not None:
            raise ConfigError("--assume and --device-rates go with --scaling alone")
        return None
    return {
        "worlds": numbers(args.scaling),
        "rates": rates(args.device_rates),
        "constants": constants(args.assume),
    }


def numbers(text: str) -> list[int]:
    """``8,16`` as numbers of devices.

    Raises:
        ConfigError: it is something else.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"--scaling {text}: numbers of devices with commas between them, such as 8,64,512")
    return found


def rates(text: str | None) -> list[tuple[int, float]]:
    """``32:610,128:1050`` as micro-batches and images/s.

    Raises:
        ConfigError: it is something else.
    """
    if text is None:
        return []
    try:
        found = [(int(m), float(x)) for m, x in (part.split(":") for part in text.split(","))]
    except ValueError:
        found = []
    if (
        not found
        or not all(1 <= m <= 1e6 and 1e-3 <= x <= 1e6 for m, x in found)
        or len(dict(found)) < len(found)
    ):
        raise ConfigError(
            f"--device-rates {text}: MICRO_BATCH:IMAGES_PER_SECOND, such as 32:610,128:1050; a micro-batch from 1 to a million images, "
            "from 0.001 to a million a second"
        )
    return found


def constants(assumed: Sequence[str]) -> Constants:
    """The model's constants with those that the command line changes.

    Raises:
        ConfigError: no such constant, or no number within ``FACTOR`` of its default, or a share above 1.
    """
    from dattrain.planning.scaling import Constants

    known = {each.name: float(str(each.default)) for each in fields(Constants)}
    found: dict[str, float] = {}
    for part in assumed:
        name, _, value = part.partition("=")
        if name not in known:
            raise ConfigError(f"--assume {part}: no such constant; there are {', '.join(known)}")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = 0.0
        least, most = known[name] / FACTOR, 1.0 if name in SHARES else known[name] * FACTOR
        if not least <= found[name] <= most:
            raise ConfigError(f"--assume {part}: {name} is a number from {least:.3g} to {most:,.6g}")
    return Constants(**found)


def render(found: dict[str, Any], used: Constants) -> str:
    """The estimate in words, with what it takes for granted."""
    from dattrain.text import columns

    rows = found["rows"]
    lines = [
        f"strong scaling, estimated by a model and not measured: ZeRO-{found['stage']}, {found['gradient_bytes'] / 1e6:,.0f} MB of gradients in "
        f"{found['reductions']} reductions (buckets of {found['bucket']:,} elements), nodes of {found['per_node']} devices",
        f"one device alone: {found['single_images_per_s']:,.0f} images/s at {found['single_micro_batch']} a time ({_source(found)})",
        "",
    ]
    header = [
        "devices",
        "batch",
        "update ms",
        "compute",
        "gradients",
        "weights",
        "optimizer",
        "agreement",
        "images/s",
        "efficiency",
        "hours",
    ]
    table = [
        [
            f"{r['world']:,}", f"{r['micro_batch']} x {r['accumulation']}", _ms(r["seconds"]), _ms(r["compute_s"]),
            _ms(r["reduction_s"]), _ms(r["weights_s"]), _ms(r["optimizer_s"]), _ms(r["agreement_s"]),
            f"{r['images_per_s']:,.0f}", f"{r['efficiency']:.2f}", "" if r["hours"] is None else f"{r['hours']:,.1f}",
        ]
        for r in rows
    ]  # fmt: skip
    lines += columns([header, *table], right=range(len(header)))
    lines += ["", *_alternatives(rows), *_slower(found["rate_points"]), ""]
    if found["too_small_from"] is not None:
        lines.append(
            f"below {found['least_micro_batch']:.3g} images a micro-batch takes no less time: from {found['too_small_from']:,} devices on "
            "a device has fewer an update, and more devices wait instead of working"
        )
    if found["least_s"]:
        least = {name: f"{seconds * 1e3:.3g} ms" for name, seconds in found["least_s"].items()}
        lines.append(
            "a micro-batch takes at least " + ", ".join(f"{ms} ({name})" for name, ms in least.items())
        )
    lines += [
        "batch: micro-batch x accumulated. gradients, weights: what communication adds to an update; what computation hides is left out",
        "efficiency: images/s over the devices' number times one device's. A node reads and decodes on so many cores while training",
        "",
        "taken for granted (--assume NAME=X):",
        *(
            f"  {each.name}={getattr(used, each.name):.6g}"
            + (f": {each.metadata['source']}" if getattr(used, each.name) == each.default else ": given")
            for each in fields(used)
        ),
    ]
    return "\n".join(lines)


def _source(found: dict[str, Any]) -> str:
    """Where the rate of one device is from; that it lies between or beyond the given ones, where it does."""
    given = [m for m, _ in found["rate_points"]]
    if found["rate"] != "given" or found["single_micro_batch"] in given:
        return str(found["rate"])
    return "not given: by those at " + ", ".join(f"{m:.0f}" for m in given)


def _slower(points: Sequence[tuple[float, float]]) -> list[str]:
    """A line where a larger micro-batch was measured to give fewer images/s, by a hundredth or more."""
    for (low, before), (high, after) in itertools.pairwise(points):
        if high / after < 0.99 * low / before:
            return [
                f"--device-rates: {high:.0f} images at a time are slower ({high / after:,.0f} images/s) than {low:.0f} ({low / before:,.0f}), "
                "which is taken as it is given: measure again, or do not make train.micro_batch larger"
            ]
    return []


def _alternatives(rows: Sequence[dict[str, Any]]) -> list[str]:
    from dattrain.text import columns

    stages = list(rows[0]["seconds_by"]["stage"])
    header = [
        "devices",
        *(f"ZeRO-{stage} ms" for stage in stages),
        "node images/s",
        "MB/s",
        "cores",
        "GB sent",
    ]
    table = [
        [
            f"{r['world']:,}", *(_ms(r["seconds_by"]["stage"][stage]) for stage in stages),
            f"{r['node_images_per_s']:,.0f}", f"{r['node_bytes_per_s'] / 1e6:,.0f}", f"{r['node_cores']:.1f}",
            f"{r['sent_bytes'] / 1e9:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    shown = columns([header, *table], right=range(len(header)))
    words = [_change(r["better"]) for r in rows]
    if not any(words):
        return shown
    width = max(map(len, shown)) + 2
    return [
        line.ljust(width) + word for line, word in zip(shown, ["what would shorten an update", *words])
    ]  # fmt: skip


def _change(better: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{NAMES[name]}={b['value']:.0f} (-{b['saves']:.0%})" for name, b in better.items())


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
