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
    origin = f" ({report['source']})" if report["source"] else ""
    return (
        f"{report['model']}{origin}: {report['name']}, {height} x {width}, {report['classes']} classes, "
        f"{report['parameters'] / 1e6:.3f}M parameters, {_cost(report['gflops'])} FLOPs"
    )


def summary(report: Mapping[str, Any]) -> str:
    """The metrics of one model."""
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


def corruptions(report: Mapping[str, Any]) -> str:
    """ImageNet-C: a line per corruption, and the means."""
    lines = [
        f"  {row['corruption']:20} top-1 {row['top1']:6.2f} %   error relative to AlexNet {row['ce']:6.1f} %"
        for row in report["corruptions"]
    ]
    missing = " (needs all 15 corruptions)" if math.isnan(report["mce"]) else ""
    return "\n".join([*lines, f"  mean top-1 {report['top1']:.2f} %   mCE {report['mce']:.1f} %{missing}"])


def comparison(reports: Sequence[Mapping[str, Any]], all_records: Sequence[Records | None]) -> str:
    """One table of several models; where they saw the same images, the difference to the first, pair by pair."""
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


def finite(value: Any) -> Any:
    """NaN is not JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cost(gflops: float) -> str:
    return f"{gflops:.3f}G" if gflops >= 0.1 else f"{1000 * gflops:.2f}M"
