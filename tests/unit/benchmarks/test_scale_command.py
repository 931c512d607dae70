"""The page of what grows with the ranks: its command runs, and what shall not grow does not."""

import pytest

from benchmarks import scale, scale_network


def rows(part, tmp_path, worlds=(16, 64)):
    found = []
    for world in worlds:
        (tmp_path / f"{part}{world}").mkdir()
        found.append(scale.PARTS[part](world, tmp_path / f"{part}{world}"))
    return found


def test_status_opens_as_much_whatever_the_number_of_ranks(tmp_path):
    few, many = rows("status", tmp_path)
    for name in ("status: opens", "status: looks and sizes asked"):
        assert few[name] == many[name] < 20, name
    assert "| 16 | 64 |" in scale.table({16: few, 64: many}).splitlines()[0]


def test_what_a_checkpoint_costs_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "shapes", lambda: {"w": (64, 40), "b": (64,)})
    (row,) = rows("checkpoints", tmp_path, (16,))
    assert row["save: opens + sizes asked of other files, another"] == 0
    assert row["verify: opens"] == 17 and row["prune of one of two: removes"] == 17


def test_the_sockets_by_formula_are_those_counted(tmp_path):
    (row,) = rows("rendezvous", tmp_path, (12,))  # it checks each against the other; no power of two
    assert row["as it is: connections"] == len(scale_network.exchanges(12)) < row["all with all: connections"]


@pytest.mark.parametrize("world", [64, 4096])
def test_gpus_agree_by_a_tree(world, tmp_path):
    row = scale_network.agreement(world, tmp_path)
    assert row["status on GPUs: NCCL, us"] < 200 < row["status on CPUs: gloo's ring, us"]
