"""Damage, other models, full disks, silent ranks, rollbacks: scenarios of ``state_trouble.py``, on two ranks that start once."""

from __future__ import annotations

from state_ranks import HERE, finished, spawn

SCENARIOS = [
    "damaged_on_one_rank",
    "one_rank_cannot_load",
    "tensors_of_rank_0",
    "waits_for_rank_0",
    "all_damaged",
    "another_model",
    "copied_beside_the_pass",
    "ema_on_and_off",
    "ema_against_unsharded",
    "one_rank_cannot_write",
    "the_next_step_hears_of_it",
    "a_blocking_save_after_a_failure",
    "a_silent_rank",
    "rollback",
]


def test_trouble(tmp_path):
    for output in finished(spawn(2, [str(HERE / "state_trouble.py"), str(tmp_path), *SCENARIOS])):
        assert [line.split(":")[0] for line in output.splitlines() if line.endswith(": passed")] == SCENARIOS
