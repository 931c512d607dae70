import pytest

from dattrain.config.load import loads
from dattrain.engine.log_interval import LogInterval
from dattrain.errors import ConfigError


def test_lines_by_updates_and_by_the_clock_of_rank_0():
    now = [0.0]
    by_updates = LogInterval(3, first=False, clock=lambda: now[0])
    assert [step for step in range(1, 8) if by_updates.due(step)] == [3, 6]
    by_time, other = (LogInterval("1m", first=first, clock=lambda: now[0]) for first in (True, False))
    said = []
    for step in range(1, 8):
        now[0] += 25
        assert not other.due(step)
        if by_time.due(step):
            said.append(step)
            by_time.logged()
    assert said == [3, 6]


def test_a_recipe_gives_either():
    assert loads("train: {log_every: 7}").config.train.log_every == 7
    assert loads("train: {log_every: 1.5h}").config.train.log_every == "1.5h"
    for wrong in ("0", "0s", "30", "30 s", "soon"):
        with pytest.raises(
            ConfigError, match="train.log_every: write a number of updates from 1 on"
        ) as error:
            loads(f"train: {{log_every: '{wrong}'}}" if wrong != "0" else "train: {log_every: 0}")
        assert len(str(error.value).splitlines()) == 1
