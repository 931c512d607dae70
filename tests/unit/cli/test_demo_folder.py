"""The demo clears its own folder, and nobody else's."""

import pytest

from dattrain.cli.demo import MADE, RUNS
from dattrain.cli.demo_steps import clear
from dattrain.errors import UserError


def test_a_folder_that_holds_more_than_a_demo_made_is_refused_untouched(tmp_path):
    out = tmp_path / "out"
    for name in ("shards", "pretrain/checkpoints"):
        (out / name).mkdir(parents=True)
    clear(out, MADE, RUNS)
    assert out.is_dir() and not any(out.iterdir())
    for name in ("checkpoints/step_00000010", "shards"):
        (out / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"--out .*out: .* holds more than a demo made \(checkpoints\)"):
        clear(out, MADE, RUNS)
    assert (out / "checkpoints/step_00000010").is_dir()
