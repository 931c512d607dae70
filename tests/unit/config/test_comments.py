"""Reasons behind the values of a config: written, read again, shown, and dropped with the value that they were of."""

import yaml

from dattrain.config.comments import annotate
from dattrain.config.load import dump, given, load, loads, reasons, show


def test_reasons_go_round_and_change_no_value(tmp_path):
    config = loads(
        "description: " + "long " * 60 + "\naugment: {crop_scale: [0.5, 1.0]}\nname: '#1: x'"
    ).config
    why = {
        "name": "as the # folder",
        "augment.crop_scale": "two\nlines",
        "optim.lr": "a: b",
        "description": "no room",
    }
    text = dump(config, why)
    assert yaml.safe_load(text) == yaml.safe_load(dump(config))
    (tmp_path / "r.yaml").write_text(text)
    loaded = load(tmp_path / "r.yaml")
    assert loaded.config == config
    assert reasons(loaded) == {
        "name": "as the # folder",
        "augment.crop_scale": "two lines",
        "optim.lr": "a: b",
    }
    line = next(line for line in show(loaded).splitlines() if line.startswith("optim.lr:"))
    assert line.endswith("a: b") and f"{tmp_path / 'r.yaml'}:" in line
    over = load(tmp_path / "r.yaml", ["optim.lr=1e-2"])
    assert "optim.lr" not in reasons(over) and "a: b" not in show(over)


def test_a_mapping_on_one_line_is_read_as_a_person_writes_it():
    loaded = loads("schedule: {epochs: 3, warmup_epochs: 0}  # short\noptim:\n  lr: 1e-3   # peak\n")
    assert reasons(loaded)["optim.lr"] == "peak"
    assert annotate("a: 1\nb:\n  c: x\n", {"b.c": "why", "z": "not there"}) == "a: 1\nb:\n  c: x  # why\n"


def test_what_is_given_is_known_before_it_is_checked():
    assert given(["schedule.epochs=5", "model.overrides={offsets: false}"]) == {
        "schedule.epochs": 5, "model.overrides.offsets": False,
    }  # fmt: skip
    assert given({"optim.lr": 1e-3}) == {"optim.lr": 1e-3}
