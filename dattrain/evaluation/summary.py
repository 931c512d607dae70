"""The metrics of an evaluation as lines and tables of text. They are computed in ``metrics``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dattrain.evaluation import metrics
from dattrain.evaluation.metrics import Records
from dattrain.text import columns


def headline(report: Mapping[str, Any]) -> str:
    """What is evaluated, in one line."""
    height, width = report["img_size"]
    dense = report["task"] != "classification"
    size = f"shorter side {height}, longer at most {width}" if dense else f"{height} x {width}"
    origin = f" ({report['source']})" if report["source"] else ""
    return (
        f"{report['model']}{origin}: {report['name']}, {size}, {report['classes']} classes, "
        f"{report['parameters'] / 1e6:.3f}M parameters, {_cost(report['gflops'])} FLOPs"
    )


def results(report: Mapping[str, Any]) -> str:
    """The metrics of one model, whatever was evaluated."""
    if report["task"] == "segmentation":
        return segmentation(report)
    if report["task"] == "detection":
        return detection(report)
    return corruptions(report) if "corruptions" in report else summary(report)


def summary(report: Mapping[str, Any]) -> str:
    """The metrics of one classifier."""
    bad = f", {report['bad']} could not be read" if report["bad"] else ""
    views = f", {report['views']} views each" if report["views"] > 1 else ""
    lines = [
        f"  {report['data']}: {report['images']} images{bad}{views}",
        f"  top-1 {report['top1']:.2f} % (95 % interval {report['top1_low']:.2f} to {report['top1_high']:.2f})"
        f"   top-5 {report['top5']:.2f} %",
    ]
    if "loss" in report:
        lines.append(
            f"  cross-entropy {report['loss']:.4f}   Brier {report['brier']:.4f}   calibration error (ECE) {report['ece']:.2f} %"
        )
    if "knn_top1" in report:
        lines.append(
            f"  {report['knn_k']} nearest neighbours on frozen features: top-1 {report['knn_top1']:.2f} %"
        )
    if "linear_top1" in report:
        lines.append(
            f"  linear classifier on frozen features: top-1 {report['linear_top1']:.2f} % (weight decay {report['linear_decay']:g})"
        )
    lines.append(
        f"  network {report['network_images_per_s']:.0f} images/s, with data {report['images_per_s']:.0f} images/s "
        f"({report['device']}, {report['precision']})"
    )
    return "\n".join(lines)


def segmentation(report: Mapping[str, Any]) -> str:
    """The metrics of a segmentation network, with a table of its classes."""
    bad = f", {report['bad']} could not be used" if report["bad"] else ""
    ways = [
        *(["windows"] if report["mode"] == "slide" else []),
        *(
            [f"scales {', '.join(f'{scale:g}' for scale in report['scales'])}"]
            if report["scales"] != [1.0]
            else []
        ),
        *(["mirrored too"] if report["flip"] else []),
    ]
    rows = [["class", "IoU", "Acc", "pixels"]]
    total = sum(row["pixels"] for row in report["per_class"]) or 1
    for row in report["per_class"]:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
        rows.append([row["name"], f"{row['iou']:.2f}", accuracy, f"{100 * row['pixels'] / total:.2f} %"])
    absent = report["classes"] - len(report["per_class"])
    lines = [
        f"  {report['data']}: {report['images']} images{bad}" + (f"; {'; '.join(ways)}" if ways else ""),
        f"  mIoU {report['miou']:.2f} %   mAcc {report['macc']:.2f} %   aAcc {report['aacc']:.2f} %   loss {report['loss']:.4f}",
        *(f"    {line}" for line in columns(rows, right=(1, 2, 3))),
        *([f"    {absent} more neither in these images nor predicted"] if absent else []),
        f"  network {report['network_images_per_s']:.2f} images/s, with data {report['images_per_s']:.2f} images/s "
        f"({report['device']}, {report['precision']})",
    ]
    return "\n".join(lines)


_MATCHED = {"": "boxes", "mask_": "masks", "boundary_": "masks by their outlines"}
_COLUMNS = {
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "APs", "ap_medium": "APm", "ap_large": "APl",
    "ar1": "AR1", "ar10": "AR10", "ar100": "AR100", "ar_small": "ARs", "ar_medium": "ARm", "ar_large": "ARl",
}  # fmt: skip


def detection(report: Mapping[str, Any]) -> str:
    """The metrics of a detector, with a table of its classes."""
    bad = f", {report['bad']} could not be used" if report["bad"] else ""
    there = {prefix: said for prefix, said in _MATCHED.items() if f"{prefix}ap" in report}
    numbers = [["", *_COLUMNS.values()]]
    numbers += [
        [said, *(_percent(report.get(f"{prefix}{key}")) for key in _COLUMNS)]
        for prefix, said in there.items()
    ]
    masks = any("mask_ap" in row for row in report["per_class"])
    rows = [["class", "objects", "AP", "AP50", *(["mask AP", "mask AP50"] if masks else [])]]
    for row in report["per_class"]:
        keys = ("ap", "ap50", "mask_ap", "mask_ap50") if masks else ("ap", "ap50")
        rows.append([row["name"], f"{row['objects']:,}", *(_percent(row[key]) for key in keys)])
    absent = report["classes"] - len(report["per_class"])
    lines = [
        f"  {report['data']}: {report['images']} images{bad}; of each at most {report['max_detections']} objects of a score of "
        f"{report['score_threshold']:g} or more",
        *(f"    {line}" for line in columns(numbers, right=range(1, len(numbers[0])))),
        *(f"    {line}" for line in columns(rows, right=range(1, len(rows[0])))),
        *([f"    {absent} more neither in these images nor found"] if absent else []),
        f"  network {report['network_images_per_s']:.2f} images/s, with data {report['images_per_s']:.2f} images/s "
        f"({report['device']}, {report['precision']})",
    ]
    return "\n".join(lines)


def corruptions(report: Mapping[str, Any]) -> str:
    """ImageNet-C: a line per corruption, and the means."""
    lines = [
        f"  {row['corruption']:20} top-1 {row['top1']:6.2f} %   error relative to AlexNet {row['ce']:6.1f} %"
        for row in report["corruptions"]
    ]
    missing = " (needs all 15 corruptions)" if math.isnan(report["mce"]) else ""
    return "\n".join([*lines, f"  mean top-1 {report['top1']:.2f} %   mCE {report['mce']:.1f} %{missing}"])


def comparison(reports: Sequence[Mapping[str, Any]], all_records: Sequence[Records | None]) -> str:
    """One table of several models of one task; where classifiers saw the same images, the difference to the first, pair by pair."""
    if reports[0]["task"] == "segmentation":
        return _segmentations(reports)
    if reports[0]["task"] == "detection":
        return _detections(reports)
    head = [
        "model",
        "size",
        "params",
        "FLOPs",
        "top-1",
        "top-5",
        "loss",
        "ECE",
        "images/s",
        "top-1 to the first (95 %)",
    ]
    rows = [head]
    first = all_records[0]
    for report, records in zip(reports, all_records):
        difference = ""
        if records is not None and first is not None and records is not first:
            difference = "other images"
            if len(records) == len(first) and (records.label == first.label).all():
                gain = 100.0 * metrics.hits(records, 1) - 100.0 * metrics.hits(first, 1)
                low, high = metrics.bootstrap_interval(gain)
                difference = f"{gain.mean():+.2f} ({low:+.2f} to {high:+.2f})"
        rows.append(
            [
                report["model"],
                " x ".join(map(str, report["img_size"])),
                f"{report['parameters'] / 1e6:.2f}M",
                _cost(report["gflops"]),
                *(f"{report[k]:.2f}" if k in report else "" for k in ("top1", "top5")),
                *(
                    f"{report[k]:.{n}f}" if k in report else ""
                    for k, n in (("loss", 4), ("ece", 2), ("network_images_per_s", 0))
                ),
                difference,
            ]
        )
    return "\n".join(columns(rows, right=range(1, len(head) - 1)))


def _segmentations(reports: Sequence[Mapping[str, Any]]) -> str:
    rows = [["model", "size", "params", "FLOPs", "mIoU", "mAcc", "aAcc", "loss", "images/s"]]
    for report in reports:
        rows.append(
            [
                report["model"],
                " x ".join(map(str, report["img_size"])),
                f"{report['parameters'] / 1e6:.2f}M",
                _cost(report["gflops"]),
                *(f"{report[key]:.2f}" for key in ("miou", "macc", "aacc")),
                f"{report['loss']:.4f}",
                f"{report['network_images_per_s']:.2f}",
            ]
        )
    return "\n".join(columns(rows, right=range(1, len(rows[0]))))


def _detections(reports: Sequence[Mapping[str, Any]]) -> str:
    keys = [f"{prefix}{key}" for prefix in ("", "mask_") for key in ("ap", "ap50", "ap75")]
    shown = [key for key in keys if any(key in report for report in reports)]
    heads = [f"{'mask ' * key.startswith('mask_')}{_COLUMNS[key.removeprefix('mask_')]}" for key in shown]
    rows = [["model", "size", "params", "FLOPs", *heads, "images/s"]]
    for report in reports:
        rows.append(
            [
                report["model"],
                " x ".join(map(str, report["img_size"])),
                f"{report['parameters'] / 1e6:.2f}M",
                _cost(report["gflops"]),
                *(_percent(report.get(key)) for key in shown),
                f"{report['network_images_per_s']:.2f}",
            ]
        )
    return "\n".join(columns(rows, right=range(1, len(rows[0]))))


def _percent(value: float | None) -> str:
    """A number in percent; nothing where there is none."""
    return "" if value is None else f"{value:.2f}"


def finite(value: Any) -> Any:
    """NaN is not JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cost(gflops: float) -> str:
    return f"{gflops:.3f}G" if gflops >= 0.1 else f"{1000 * gflops:.2f}M"
