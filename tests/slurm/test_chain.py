"""Chains on the real queue: to the end, and when the first stage fails."""

from __future__ import annotations

import copy
import json
import os
import signal

import objects
import pytest
import yaml
from conftest import Site, ranks, step_of

CHAIN = """
name: three
stages:
  pretrain: {config: tiny.yaml, nodes: 2}
  finetune:
    config: tiny.yaml
    from: pretrain
    nodes: 1
    overrides: [model.img_size=64, schedule.epochs=1, schedule.warmup_epochs=0, init.head=new]
  evaluate: {evaluate: finetune, nodes: 1}
"""


def _submit(site: Site, name: str, *overrides: str) -> None:
    (site.folder / "chain.yaml").write_text(CHAIN)
    site.started.append(site.folder / "runs" / name)
    site.dattrain("submit", "chain.yaml", *overrides, "--cluster", str(site.profile), "--run", f"runs/{name}")


def test_a_failing_first_stage_cancels_the_rest_and_status_says_so(site: Site) -> None:
    _submit(site, "broken", f"pretrain.data.train={site.folder}/nowhere")
    root = site.folder / "runs" / "broken"
    found = site.wait(root / "pretrain", "failed")
    assert "nowhere" in found["why"]
    for name in ("finetune", "evaluate"):
        site.wait(root / name, "cancelled", seconds=60)
    shown = site.dattrain("status", str(root), check=False)
    assert shown.returncode == 1
    assert shown.stdout.count("did not end well") == 2
    assert site.cluster.run("squeue", "-h").strip() == ""


@pytest.mark.full
@pytest.mark.parametrize("requeue", ["scontrol", "follow-up"])
def test_three_stages_run_to_the_end_through_a_crash_of_the_first(site: Site, requeue: str) -> None:
    profile = site.folder / f"chain-{requeue}.yaml"
    profile.write_text(site.profile.read_text() + f"requeue: {requeue}\n")
    site.profile, before = profile, site.profile
    try:
        _submit(site, f"whole-{requeue}")
    finally:
        site.profile = before
    root = site.folder / "runs" / f"whole-{requeue}"
    first = root / "pretrain"
    site.wait_for(lambda: step_of(first) >= 10 and list(first.glob("checkpoints/*/manifest.json")), run=first)
    os.kill(ranks(site.status(first)["job"])[1], signal.SIGKILL)
    site.wait(root / "evaluate", seconds=500)
    reports = [site.status(root / name) for name in ("pretrain", "finetune", "evaluate")]
    assert [one["state"] for one in reports] == ["finished"] * 3
    assert len(reports[0]["restarts"]) == 1
    log = site.dattrain("logs", str(root / "finetune"), "-n", "0").stdout
    assert f"init.from={first}" in log
    figures = json.loads((root / "evaluate" / "evaluation.json").read_text())
    assert reports[2]["top1"] == pytest.approx(figures["top1"])


DETECTION = """
name: dense
stages:
  pretrain: {config: tiny.yaml, nodes: 1, overrides: [model.img_size=64, schedule.epochs=1, schedule.warmup_epochs=0]}
  detect: {config: objects.yaml, from: pretrain, nodes: 2}
  evaluate: {evaluate: detect, nodes: 1}
"""


@pytest.mark.full
def test_pre_training_then_detection_killed_and_resumed_then_its_evaluation(site: Site) -> None:
    recipe = copy.deepcopy(objects.RETINANET)
    recipe["schedule"].update(updates=150, milestones=[100, 130])
    recipe["train"].update(max_steps=None)
    recipe["checkpoint"].update(every_steps=10, keep_last=5)
    recipe["eval"]["every_steps"] = 75
    (site.folder / "objects.yaml").write_text(yaml.safe_dump(recipe))
    sets = objects.write(site.folder / "objects", train=48, val=8)
    (site.folder / "dense.yaml").write_text(DETECTION)
    root = site.folder / "runs" / "dense"
    site.started.append(root)
    site.dattrain(
        "submit", "dense.yaml", *(f"detect.{each}" for each in sets), "--cluster", str(site.profile), "--run", "runs/dense"
    )  # fmt: skip
    run = root / "detect"
    site.wait_for(lambda: step_of(run) >= 10 and list(run.glob("checkpoints/*/manifest.json")), run=run)
    os.kill(ranks(site.status(run)["job"])[1], signal.SIGKILL)
    site.wait(root / "evaluate", seconds=500)
    reports = {name: site.status(root / name) for name in ("pretrain", "detect", "evaluate")}
    assert {one["state"] for one in reports.values()} == {"finished"}
    assert len(reports["detect"]["restarts"]) == 1
    assert step_of(run) == 150
    figures = json.loads((root / "evaluate" / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "ema_ap" in row][-1]
    assert figures["images"] == 8
    assert figures["ap"] == pytest.approx(last["ema_ap"], abs=0.01), "the averages, as eval takes them"
