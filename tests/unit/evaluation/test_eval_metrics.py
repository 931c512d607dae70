"""Figures of an evaluation against hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dattrain.evaluation import metrics


def make(logits, labels, start=0):
    logits = torch.tensor(logits, dtype=torch.float64)
    labels = torch.tensor(labels)
    return metrics.record(logits.softmax(1), labels, torch.arange(start, start + len(labels)))


def test_record_keeps_best_classes_loss_and_brier():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 3, 8, -1, 2, 2])
    kept = metrics.record(logits.softmax(1), labels, torch.arange(6))
    assert (kept.top == logits.argsort(1, descending=True)[:, :5].numpy()).all()
    expected = torch.nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none").numpy()
    known = labels.numpy() >= 0
    np.testing.assert_allclose(kept.nll[known], expected[known])
    assert math.isnan(kept.nll[3]) and math.isnan(kept.brier[3])
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), 9)
    np.testing.assert_allclose(kept.brier[known], (logits.softmax(1) - onehot).square().sum(1).numpy()[known])


def test_join_restores_the_order_of_the_data_set():
    a, b = make([[1, 0], [0, 1]], [0, 1], start=2), make([[3, 0], [0, 5]], [1, 1], start=0)
    whole = metrics.join([a, b])
    assert whole.index.tolist() == [0, 1, 2, 3]
    assert whole.label.tolist() == [1, 1, 0, 1]


def test_top1_top5_ignores_unlabelled_images_and_accepts_sets():
    logits = [[6, 5, 4, 3, 2, 1, 0]] * 4
    kept = make(logits, [0, 4, 6, -1])
    assert metrics.top1_top5(kept) == pytest.approx((100 / 3, 200 / 3))
    accepted = [frozenset({1, 0}), frozenset(), frozenset({6}), frozenset({5, 4})]
    assert metrics.top1_top5(kept, accepted) == pytest.approx((100 / 3, 200 / 3))


def test_per_class_and_confusion():
    kept = make([[2, 1, 0], [0, 2, 1], [0, 2, 1], [0, 1, 2], [0, 2, 1]], [0, 0, 1, 1, 2])
    rows = {row["class"]: row for row in metrics.per_class(kept, 3)}
    assert rows[0]["top1"] == 50 and rows[0]["precision"] == 100
    assert rows[1]["top1"] == 50 and rows[1]["precision"] == pytest.approx(100 / 3)
    assert rows[2]["top1"] == 0 and rows[2]["images"] == 1
    cells = metrics.confusion(kept)
    assert sum(n for _, _, n in cells) == 5
    assert set(cells) == {(0, 0, 1), (0, 1, 1), (1, 1, 1), (1, 2, 1), (2, 1, 1)}
    assert cells[-2:] == [(0, 0, 1), (1, 1, 1)]  # the errors come first


def test_calibration_of_a_perfect_and_an_overconfident_model():
    # 80 % confident, right 8 times of 10: no gap. Always certain, right half the time: a gap of one half.
    sure = math.log(0.8 / 0.2)
    honest = make([[sure, 0.0]] * 10, [0] * 8 + [1] * 2)
    assert metrics.calibration(honest).ece == pytest.approx(0, abs=1e-12)
    loud = make([[60.0, 0.0]] * 10, [0, 1] * 5)
    result = metrics.calibration(loud)
    assert result.ece == pytest.approx(0.5) and result.mce == pytest.approx(0.5)
    assert result.count.sum() == 10 and result.count[-1] == 10


def test_bootstrap_interval_holds_the_mean_and_shrinks():
    few, many = np.array([0.0, 1.0] * 20), np.array([0.0, 1.0] * 2000)
    low, high = metrics.bootstrap_interval(few)
    assert low < 0.5 < high
    tight = metrics.bootstrap_interval(many)
    assert tight[1] - tight[0] < (high - low) / 5
