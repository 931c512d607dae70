"""Metrics of segmentation against an independent reading of mmsegmentation's definition, and against sklearn where it is."""

import numpy as np
import pytest
import torch

from dattrain.data.annotations.semantic import VOID
from dattrain.tasks.confusion import confusion, scores


def brute_force(truth, predicted, classes):
    """IoU and accuracy by class and their means, from sets of pixels; mmseg's ``intersect_and_union`` in plain numpy."""
    labelled = truth != VOID
    iou, accuracy, right_in_all = [], [], 0
    for number in range(classes):
        mine = {(int(i)) for i in np.flatnonzero(labelled & (truth == number))}
        said = {(int(i)) for i in np.flatnonzero(labelled & (predicted == number))}
        right_in_all += len(mine & said)
        iou.append(len(mine & said) / len(mine | said) if mine | said else float("nan"))
        accuracy.append(len(mine & said) / len(mine) if mine else float("nan"))
    return np.array(iou), np.array(accuracy), right_in_all / labelled.sum()


CASES = {
    "all classes": (range(5), range(5), 0.2),
    "no void": (range(5), range(5), 0.0),
    "class 3 absent in the truth": ((0, 1, 2, 4), range(5), 0.3),
    "class 3 never predicted": (range(5), (0, 1, 2, 4), 0.3),
    "classes 3 and 4 in neither": (range(3), range(3), 0.1),
    "almost all void": (range(5), range(5), 0.97),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_sets_of_pixels(case, seed):
    there, said, void = CASES[case]
    random = np.random.default_rng(seed)
    truth = random.choice(list(there), (6, 17, 23)).astype(np.uint8)
    predicted = np.where(random.random(truth.shape) < 0.5, truth, random.choice(list(said), truth.shape))
    predicted = np.where(np.isin(predicted, list(said)), predicted, said[0]).astype(np.uint8)
    truth[random.random(truth.shape) < void] = VOID
    # Summed over images, as an evaluation does.
    matrix = sum(
        confusion(torch.from_numpy(t), torch.from_numpy(p), 5) for t, p in zip(truth, predicted, strict=True)
    )
    found = scores(matrix)
    iou, accuracy, right = brute_force(truth.ravel(), predicted.ravel(), 5)
    assert matrix.dtype == torch.int64 and int(matrix.sum()) == int((truth != VOID).sum())
    np.testing.assert_allclose(found.iou, 100 * iou, rtol=1e-14)
    np.testing.assert_allclose(found.accuracy, 100 * accuracy, rtol=1e-14)
    assert found.miou == pytest.approx(100 * np.nanmean(iou), rel=1e-14)
    assert found.macc == pytest.approx(100 * np.nanmean(accuracy), rel=1e-14)
    assert found.aacc == pytest.approx(100 * right, rel=1e-14)
    assert np.isnan(found.iou).sum() == sum(n not in {*there, *said} for n in range(5))


def test_rows_are_the_truth():
    matrix = confusion(torch.tensor([0, 0, 1, VOID]), torch.tensor([1, 1, 1, 0]), 2)
    assert matrix.tolist() == [[0, 2], [0, 1]]


def test_255_classes_and_void_are_told_apart():
    truth = torch.arange(256, dtype=torch.uint8)
    found = scores(confusion(truth, truth.clamp(max=254), 255))
    assert (found.miou, found.aacc) == (100.0, 100.0) and not np.isnan(found.iou).any()


def test_nothing_labelled_is_nan_and_no_division():
    found = scores(confusion(torch.full((9,), VOID), torch.zeros(9), 3))
    assert np.isnan([found.miou, found.macc, found.aacc, *found.iou]).all()


def test_equal_to_another_library():
    metrics = pytest.importorskip("torchmetrics.classification")
    random = np.random.default_rng(3)
    truth, predicted = (torch.from_numpy(random.integers(0, 4, (5, 31, 7))) for _ in range(2))
    truth[random.random(truth.shape) < 0.3] = VOID
    found = scores(confusion(truth, predicted, 4))
    index = metrics.MulticlassJaccardIndex(4, average="none", ignore_index=VOID)
    np.testing.assert_allclose(found.iou, 100 * index(predicted, truth).numpy(), rtol=1e-6)
    accuracy = metrics.MulticlassAccuracy(4, average="none", ignore_index=VOID)
    np.testing.assert_allclose(found.accuracy, 100 * accuracy(predicted, truth).numpy(), rtol=1e-6)
