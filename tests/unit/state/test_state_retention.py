from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from state_fakes import make

from dattrain.state.format import checkpoint, retention
from dattrain.state.format.checkpoint import CheckpointInfo
from dattrain.state.format.manifest import Manifest
from dattrain.state.format.retention import Policy, kept, to_remove


def entry(step, *, epoch=None, whole=True, pinned=False, **metrics):
    manifest = Manifest(
        step, step * 10, 1, 0, "fp32", ("param",), {}, meta={"epoch": epoch, "metrics": metrics}
    )
    return CheckpointInfo(
        Path(checkpoint.folder_name(step)), manifest if whole else None, "" if whole else "cut", pinned
    )


def steps(entries):
    return [e.step for e in entries]


def test_last_k():
    assert steps(to_remove([entry(i) for i in range(1, 6)], Policy(2))) == [1, 2, 3]


def test_damaged_ones_do_not_count_and_are_left_alone():
    line = [entry(1), entry(2), entry(3), entry(4, whole=False), entry(5, whole=False)]
    assert steps(to_remove(line, Policy(2))) == [1]


def test_pinned_ones_are_kept_and_do_not_count():
    line = [entry(1, pinned=True), entry(2), entry(3), entry(4, pinned=True)]
    assert kept(line, Policy(1)) == {
        "step_00000001": "pinned",
        "step_00000004": "pinned",
        "step_00000003": "last",
    }


def test_every_n_epochs_keeps_the_first_of_each_period():
    line = [entry(i, epoch=i * 0.5) for i in range(1, 12)]
    assert steps(to_remove(line, Policy(1, keep_every_epochs=2))) == [1, 2, 3, 5, 6, 7, 9, 10]
    # Epochs as they come out of samples / samples_per_epoch.
    third = [entry(i, epoch=i * (1 / 3)) for i in range(1, 7)]
    assert "step_00000003" in kept(third, Policy(1, keep_every_epochs=1))


def test_best_by_metric_highest_or_lowest_and_never_by_nan():
    line = [
        entry(1, top1=50.0, val_loss=1.0),
        entry(2, top1=70.0, val_loss=3.0),
        entry(3, top1=float("nan")),
        entry(4),
    ]
    assert kept(line, Policy(1, keep_best=1)) == {"step_00000004": "last", "step_00000002": "best top1"}
    assert "step_00000001" in kept(line, Policy(1, keep_best=1, metric="val_loss"))
    tie = [entry(1, top1=5.0), entry(2, top1=5.0), entry(3, top1=1.0)]
    assert "step_00000002" in kept(tie, Policy(1, keep_best=1)), "the newer one of equals"


@pytest.mark.parametrize("fields", [{"keep_last": 0}, {"keep_every_epochs": 0.0}])
def test_a_policy_that_keeps_nothing_is_refused(fields):
    with pytest.raises(ValueError):
        Policy(**fields)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 30), st.none() | st.floats()), max_size=12),
    st.builds(Policy, st.integers(1, 4), st.none() | st.floats(0.1, 10), st.integers(0, 3)),
)
def test_the_newest_whole_one_and_whatever_is_damaged_or_pinned_stay(rows, policy):
    line = [entry(i + 1, whole=w, pinned=p, epoch=e, top1=m) for i, (w, p, e, m) in enumerate(rows)]
    gone = to_remove(line, policy)
    whole = [e for e in line if e.manifest]
    assert all(e.manifest and not e.pinned for e in gone)
    if whole:
        assert whole[-1] not in gone
        assert len(whole) - len(gone) >= min(policy.keep_last, len(whole))
    left = [e for e in line if e not in gone]
    assert to_remove(left, policy) == [] or policy.keep_every_epochs is not None or policy.keep_best


def test_prune_renames_before_it_deletes(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        make(tmp_path, step)
    monkeypatch.setattr(
        retention.checkpoint.shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        retention.prune(tmp_path, Policy(1))
    monkeypatch.undo()
    assert [checkpoint.verify(e.folder).step for e in checkpoint.list_all(tmp_path)][-1] == 3
    checkpoint.recover(tmp_path)
    assert retention.prune(tmp_path, Policy(1))
    assert os.listdir(tmp_path) == ["step_00000003"]


def test_one_that_was_skipped_takes_no_place_from_what_was_saved_after_it(tmp_path):
    for step in (1, 2, 9):
        make(tmp_path, step)
    assert retention.prune(tmp_path, Policy(1), {"step_00000009"}) == ["step_00000001"]
    assert steps(checkpoint.list_all(tmp_path)) == [2, 9]
