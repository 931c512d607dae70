"""``dattrain report RUN...``: one self-contained page of a run, or of several side by side, and a picture of the curves."""

from __future__ import annotations

import argparse
from pathlib import Path

from dattrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders; an array, a chain or a folder of runs for all in it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page (default: RUN/report.html; needed for several runs)",
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="evaluate the newest checkpoints on data.val anew for the confused classes and the images "
        "(default: what the last evaluation of the training kept, and only where that kept none)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Write the page and, beside it, ``results.png``; exit code 0."""
    from dattrain.report import page
    from dattrain.submit import history, run_folders

    folders = list(dict.fromkeys(run_folders.find(args.runs)))
    if len(folders) > 1 and args.out is None:
        raise UserError(f"{len(folders)} runs go into one page: name it with --out FILE.html", exit_code=2)
    out: Path = args.out or folders[0] / page.FILE
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it", exit_code=2)
    found = []
    titles = run_folders.titles(folders)
    for folder, title in zip(folders, titles):
        for problem in _predict(folder, args.evaluate, args.device):
            print(f"{title}: no images and no confused classes in the report: {problem}")
        found.append(page.collect(folder, history.history(folder), alive=_alive(folder), title=title))
    from dattrain.report import chart

    picture = out.with_name(chart.FILE) if args.out is None else out.with_suffix(".png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.write(out, found)
        chart.write(picture, folders, titles)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    print(page.text(found))
    print(f"\n{out}\n{picture}")
    return 0


def _predict(folder: Path, anew: bool, device: str | None) -> list[str]:
    """See to the images of a run with their sampling points; returns what kept from it."""
    import json

    from dattrain.observe import events

    kept = folder / events.PREDICTIONS
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known is not None and "points_of" in known and not anew:
        return []
    if not any((folder / "checkpoints").glob("step_*/manifest.json")):
        return [] if known is not None else ["it has no checkpoint"]
    import torch

    from dattrain.report import pictures
    from dattrain.runtime.environment import device_called

    where = device_called(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        if known is None or anew:
            known = pictures.evaluate(folder, where)
        if not _alive(folder):  # or its next evaluation writes them anew
            pictures.with_points(folder, known, where)
    except UserError as error:
        return [str(error)]
    return []


def _alive(folder: Path) -> bool:
    from dattrain.runtime import owner

    found = owner.current_owner(folder)
    return found is not None and found[1] == "alive"
