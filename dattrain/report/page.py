"""What the page shows of a run, read from its folder, and the page: one HTML file that asks for nothing.

Curves, time line and pictures are drawn by the page's own script from the JSON in it, so that it fits any screen; what a run came to
stands in it as tables. A policy in its head forbids every request.
"""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dattrain.clock import duration
from dattrain.config.load import load
from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.data.classes import read as read_classes
from dattrain.errors import UserError
from dattrain.files import write_atomically
from dattrain.observe import events, metrics
from dattrain.pretrained import class_names
from dattrain.report import curves, detected, segmented, settings, timeline
from dattrain.state.format.retention import best_step, lower_is_better
from dattrain.text import columns
from dattrain.urls import mask

FILE = "report.html"
_PAIRS, _MATRIX = 15, 12
"""Confused pairs that are listed, and classes in the matrix beside them."""


def collect(
    run_dir: Path, jobs: Sequence[timeline.Event] = (), *, alive: bool = False, title: str | None = None
) -> dict[str, Any]:
    """Everything that the page shows of one run, as JSON.

    Args:
        jobs: the history of its jobs (``submit.history.history``).
        alive: it is being trained now.
        title: what it is called on the page; its folder's name by default.

    Raises:
        UserError: not a run folder.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config = load(run_dir / "config.yaml").config
    rows = metrics.read(run_dir)
    starts = _json(run_dir / "env.json").get("starts") or []
    found = timeline.attempts(events.read(run_dir), jobs, starts, alive=alive)
    predictions = _json(run_dir / events.PREDICTIONS)
    names = _names(run_dir, config)
    last = next((row for row in reversed(rows) if row.get("epoch")), None)
    run = {
        "title": title or run_dir.absolute().name,
        "batch": config.train.global_batch,
        "per_epoch": last["step"] / last["epoch"] if last else None,
        "panels": curves.panels(rows),
        "marks": timeline.restarts(found),
        "attempts": found,
        "settings": settings.rows(config, text, starts[0].get("command") or () if starts else ()),
        "environment": settings.environment(starts, _json(run_dir / "code.json")),
        "confusion": _confusion(predictions, names),
        "images": _images(predictions, names),
        "classes": segmented.classes(predictions, names),
        "segmented": segmented.images(predictions, names),
        "objects": detected.classes(predictions, names),
        "detected": detected.images(predictions, names),
    }
    return {**run, "summary": _summary(config, rows, found, predictions)}


def render(runs: Sequence[Mapping[str, Any]]) -> str:
    """The page of one run, or of several beside each other."""
    title = " | ".join(run["title"] for run in runs)
    data = {"runs": runs, "differing": settings.differing(runs) if len(runs) > 1 else []}
    # "<" would end the script element or begin a comment, whatever string it is in.
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = resources.files("dattrain.report").joinpath("page.html").read_text(encoding="utf-8")
    before, _, rest = template.partition("{{data}}")
    filled = before.replace("{{title}}", html.escape(title)).replace("{{summary}}", _table(runs))
    return f"{filled}{payload}{rest}"


def write(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """``render`` to a file, which is there in full or not at all. Raises OSError where it cannot be written."""
    write_atomically(path, render(runs))


def text(runs: Sequence[Mapping[str, Any]]) -> str:
    """The table at the page's head, for a terminal."""
    keys = list(dict.fromkeys(key for run in runs for key in run["summary"]))
    rows = [["", *(run["title"] for run in runs)]]
    rows += [[key, *(run["summary"].get(key, "") for run in runs)] for key in keys]
    return "\n".join(line.rstrip() for line in columns(rows))


def _summary(
    config: Config,
    rows: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, Any],
) -> dict[str, str]:
    """What a run came to, by name, as text."""
    metric = config.checkpoint.metric
    summary = {"state": _state(found), "model": _model(config)}
    evaluations = [row for row in rows if "eval_images" in row]
    if scores := metrics.scores(evaluations, metric):
        for name, step in (("best", best_step(scores, metric)), ("last", max(scores))):
            unit = "" if lower_is_better(metric) else " %"
            summary[f"{name} {metric}"] = f"{scores[step]:.2f}{unit} at step {step}"
        images = predictions.get("images") or int(evaluations[-1]["eval_images"])
        summary["evaluated on"] = f"{images:,} images of {mask(config.data.val or '?')}"
    updates = [row for row in rows if "loss" in row]
    if updates:
        last = updates[-1]
        summary["trained"] = (
            f"{last['step']:,} updates of {config.train.global_batch:,} images, {last['epoch']:.2f} epochs"
        )
        speeds = [row["images_per_s"] for row in updates if row.get("images_per_s")]
        if speeds:
            waits = statistics.fmean(row.get("data_wait") or 0 for row in updates)
            summary["speed"] = (
                f"{statistics.median(speeds):,.1f} images/s, {waits:.0%} of the time waiting for data"
            )
    if found:
        count = len(found)
        summary["time"] = (
            f"{duration(timeline.trained_s(found))} in {count} attempt{'s' if count > 1 else ''}"
        )
        skipped = sum(mark["event"] == "skipped" for each in found for mark in each["marks"])
        back = sum(mark["event"] == "rollback" for each in found for mark in each["marks"])
        if skipped or back:
            summary["trouble"] = f"{skipped} updates not finite, {back} rollbacks"
    return summary


def _model(config: Config) -> str:
    model, geometry = config.model, config.geometry
    if config.task.kind == "segmentation":
        side = f"shorter side {geometry.short_side}"
        if geometry.crop is not None:
            side = "crops of {} x {}".format(*as_pair(geometry.crop))
        return f"{model.name} with {config.task.head}, {side}, {model.num_classes} classes"
    if config.task.kind == "detection":
        sides = sorted({*(geometry.short_sides or (geometry.short_side,))})
        side = " to ".join(map(str, dict.fromkeys((sides[0], sides[-1]))))
        return f"{model.name} with {config.task.head}, shorter side {side}, {model.num_classes} classes"
    last = [model.img_size, *(phase.img_size for phase in config.train.progressive)][-1]
    height, width = as_pair(last)
    return f"{model.name}, {height} x {width}, {model.num_classes} classes"


def _state(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "not started"
    last = found[-1]
    return f"{last['how'] or 'running'}" + (f": {last['why']}" if last["why"] else "")


def _names(run_dir: Path, config: Config) -> list[str]:
    """A name per class, for people."""
    return class_names.names(config.model.num_classes, config.data.labels, read_classes(run_dir) or ())


def _confusion(predictions: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """The most confused pairs, and the matrix of the classes in them, as shares of the row's images; None before an evaluation."""
    if (
        not predictions.get("classes") or "kind" in predictions
    ):  # of dense prediction: ``segmented``, ``detected``
        return None
    total = {label: images for label, images, _ in predictions["classes"]}
    right = {label: n for label, _, n in predictions["classes"]}
    wrong = {(a, b): n for a, b, n in predictions["pairs"]}
    pairs = predictions["pairs"][:_PAIRS]
    among = list(dict.fromkeys(label for a, b, _ in predictions["pairs"] for label in (a, b)))[:_MATRIX]
    among.sort()
    cells = [[right.get(a, 0) if a == b else wrong.get((a, b), 0) for b in among] for a in among]
    return {
        "step": predictions["step"],
        "images": predictions["images"],
        "wrong": predictions["images"] - sum(right.values()),
        "pairs": [[names[a], names[b], n, total[a]] for a, b, n in pairs],
        "classes": [names[each] for each in among],
        "all": len(among) == len(total.keys() | {b for _, b in wrong}),
        "cells": cells,
        "totals": [total.get(each, 0) for each in among],
    }


def _images(predictions: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    if not (predictions.get("worst") or predictions.get("best")) or "kind" in predictions:
        return None

    def shown(kind: str) -> Iterator[dict[str, Any]]:
        for item in predictions.get(kind, ()):
            yield {
                **{key: item.get(key) for key in ("name", "picture", "confidence", "of_label", "points")},
                "label": names[item["label"]],
                "predicted": names[item["predicted"]],
            }

    return {
        "step": predictions["step"],
        "averaged": predictions.get("averaged"),
        "points_of": predictions.get("points_of"),
        "colours": predictions.get("colours"),
        "worst": list(shown("worst")),
        "best": list(shown("best")),
    }


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The summaries beside each other, as HTML."""
    keys = list(dict.fromkeys(key for run in runs for key in run["summary"]))
    cell = html.escape
    head = "".join(
        f'<th scope="col" class="run r{n}">{cell(run["title"])}</th>' for n, run in enumerate(runs)
    )
    body = "".join(
        f'<tr><th scope="row">{cell(key)}</th>'
        + "".join(f"<td>{cell(run['summary'].get(key, ''))}</td>" for run in runs)
        + "</tr>"
        for key in keys
    )
    return f'<table class="summary">{f"<thead><tr><td></td>{head}</tr></thead>" if len(runs) > 1 else ""}<tbody>{body}</tbody></table>'


def _json(path: Path) -> dict[str, Any]:
    """A file that holds an object; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
