"""Each logger gets the numbers and pictures under the same names, and a resumed run goes on where it was."""

import csv
import json
import struct
import time

import numpy as np
import pytest
from fashion_images import fashion

from dattrain.config.load import loads
from dattrain.errors import ConfigError, UserError
from dattrain.observe import loggers
from dattrain.observe.loggers import Loggers
from dattrain.observe.sheet import sheet
from dattrain.tasks.predictions import data_url

PIXELS = np.full((8, 12, 3), 200, dtype=np.uint8)


def opened(tmp_path, name, step=0, logged=0):
    return Loggers(
        [name], tmp_path, name="recipe", step=step, logged=logged, settings={"optim.lr": 0.5, "data.val": "v", "model.overrides": {}},
        metric="top1",
    )  # fmt: skip


def log(tmp_path, name, steps, step=0, logged=0):
    """Losses 1/step, and an evaluation with a picture at the last of ``steps``."""
    found = opened(tmp_path, name, step, logged)
    for n in steps:
        found.scalars(
            "train", {"step": n, "samples": 8 * n, "loss": 1 / n, "note": "x", "lr": float("nan")}, n
        )
    found.scalars("val", {"step": n, "top1": 50.0 + n}, n)
    found.image("val/worst", PIXELS, n)
    found.close()


def test_tensorboard_gets_numbers_pictures_and_settings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(tmp_path, "tensorboard", (1, 2))
    log(tmp_path, "tensorboard", (2, 4), step=1, logged=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "val/top1"]
    # What was trained anew is there once.
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert [(e.step, e.width, e.height) for e in events.Images("val/worst")] == [(4, 12, 8)]
    assert any("hparams" in tag for tag in events.summary_metadata)


def test_csv_has_every_row_once(tmp_path):
    log(tmp_path, "csv", (1, 2, 3))
    with open(tmp_path / "csv" / "train.csv", "a") as file:
        file.write("4,0.2")  # a kill in the middle of a line
    found = opened(tmp_path, "csv", step=2)
    found.scalars("train", {"step": 3, "loss": 0.25}, 3)
    found.scalars("train", {"step": 4, "loss": 0.125, "mfu": 0.5}, 4)
    found.close()
    with open(tmp_path / "csv" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in rows[2:]] == ["0.25", "0.125"] and rows[3]["mfu"] == "0.5"
    assert (tmp_path / "csv" / "val.csv").read_text().splitlines() == ["step,top1"]  # of step 3, trained anew


def records(data):
    """Of a ``.wandb`` file: LevelDB's log behind 7 bytes, blocks of 32 KiB with records of checksum, length and kind."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<4xHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of one, or its end
            yield whole
            whole = b""


def written(file, kind):
    """The records, once wandb's own process has put the last one there."""
    while True:
        found = [kind.FromString(data) for data in records(file.read_bytes())]
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.05)


def test_wandb_goes_on_in_the_same_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2 as pb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(tmp_path, "wandb", (1, 2))
    log(tmp_path, "wandb", (2, 4), step=1, logged=2)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    # Two attempts of one run, which wandb sync puts together.
    assert len(files) == 2 and {f.stem for f in files} == {
        f"run-{json.loads((tmp_path / 'loggers.json').read_text())['wandb']}"
    }
    rows, settings = [], {}
    for file in files:
        for record in written(file, pb.Record):
            if record.HasField("history"):
                rows.append({(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item})
            settings |= {i.key: i.value_json for i in record.run.config.update}
    assert [(int(r["step"]), float(r["train/loss"])) for r in rows if "train/loss" in r] == [
        (1, 1.0),
        (2, 0.5),
        (4, 0.25),
    ]
    assert [int(r["step"]) for r in rows if "val/worst/path" in r] == [2, 4]
    assert settings["optim.lr"] == "0.5"


def test_mlflow_goes_on_in_the_same_run_without_a_server(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log(tmp_path, "mlflow", (1, 2))
    log(tmp_path, "mlflow", (2, 4), step=1, logged=2)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("recipe")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["optim.lr"] == "0.5"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert [a.path for a in client.list_artifacts(run.info.run_id, "val")] == [
        "val/worst-00000002.png",
        "val/worst-00000004.png",
    ]


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="train.loggers has mlflow, .* not installed: pip install mlflow"):
        loggers.check(["csv", "mlflow"])
    loggers.check(["tensorboard", "csv"])


@pytest.mark.parametrize(
    ("value", "message"), [("[csv, csv]", "names a logger twice"), ("[comet]", "tensorboard")]
)
def test_loggers_that_are_not_there(value, message):
    with pytest.raises(ConfigError, match=message):
        loads(f"train: {{loggers: {value}}}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("name", "said"), [("tensorboard", "TensorBoard's events"), ("csv", "csv")])
def test_a_removed_folder_ends_no_training(tmp_path, caplog, name, said):
    found = opened(tmp_path, name)
    # At once, as TensorBoard's thread may write another file meanwhile.
    (tmp_path / name).rename(tmp_path / "removed")
    for step in (1, 2):
        found.scalars("train", {"loss": 1.0}, step)
    found.close()
    assert f"{said} cannot be written any more (ENOENT: No such file or directory)" in caplog.text


def test_a_sheet_has_all_images_with_text_below():
    items = [
        {
            "picture": data_url(np.repeat(image[..., None], 3, 2)),
            "label": 0,
            "predicted": n % 2,
            "confidence": 0.5,
        }
        for n, image in enumerate(fashion(8)[0])
    ]
    pixels = sheet(items, ["coat", "bag"])
    assert pixels.shape == (2 * 200, 6 * 168, 3) and pixels.dtype == np.uint8
    assert (pixels[200:, 2 * 168 :] == 255).all()  # two in the second row
    text = pixels[4 + 160 : 4 + 160 + 32, :160]
    assert (text < 128).any()
