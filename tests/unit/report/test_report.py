"""The page of a run: what stands in it is what the run wrote down, and a browser draws it without asking anybody."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fashion_images import NAMES, fashion

from dattrain.cli import main as cli
from dattrain.config.load import dump, loads
from dattrain.errors import UserError
from dattrain.observe import events
from dattrain.report import curves, settings, timeline, training
from dattrain.tasks.predictions import Predictions

CONFIG = "name: small\nmodel: {name: dat_atto, num_classes: 10, img_size: 64}\ndata: {val: /data/val}\nschedule: {epochs: 4, warmup_epochs: 1}\n"


def run_folder(root: Path, *, updates=120, lr=0.1) -> Path:
    """What a training writes, in small: it was killed at step 60, went on from 50, rolled back once and finished."""
    root.mkdir(parents=True)
    config = loads(CONFIG, {"optim.lr": lr}).config
    (root / "config.yaml").write_text(dump(config))
    (root / "classes.json").write_text(json.dumps(sorted(NAMES)))
    rows = [
        {"step": n, "samples": n * 8, "epoch": n / 30, "loss": 2 / n, "lr": lr / n, "grad_norm": None if n == 7 else 1.5,
         "images_per_s": 100.0 + n, "data_wait": 0.25}
        for n in range(1, updates + 1)
    ]  # fmt: skip
    for n in range(30, updates + 1, 30):
        rows.append(
            {"step": n, "epoch": n / 30, "top1": n / 2, "top5": 90.0, "eval_loss": 1.5, "eval_images": 60}
        )
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin = {"last": updates, "world": 2, "nodes": ["n1", "n2"], "device": "cuda:0", "job": None}
    log = [
        (100, "start", 0, begin), (160, "evaluation", 30, {}), (170, "save", 50, {}),
        (300, "start", 50, {**begin, "nodes": ["n3"]}), (310, "skipped", 55, {"in_a_row": 5}), (311, "rollback", 55, {"to": 50}),
        (400, "evaluation", updates, {}), (401, "end", updates, {"status": "finished"}),
    ]  # fmt: skip
    (root / "events.jsonl").write_text(
        "".join(json.dumps({"time": t, "event": e, "step": s, **more}) + "\n" for t, e, s, more in log)
    )
    start = {
        "command": ["dattrain", "train", "mine.yaml", f"optim.lr={lr}"],
        "host": "n1",
        "device": "H100",
        "world": 2,
    }
    (root / "env.json").write_text(json.dumps({"starts": [start]}))
    found = predictions([fashion(60)])
    (root / "predictions.json").write_text(json.dumps({"step": updates, "averaged": False, **found}))
    return root


class Exchange:
    """Of ranks that are threads."""

    def __init__(self, world):
        self.values = [None] * world
        self.barrier = threading.Barrier(world, timeout=20)

    def of(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()
            return found

        return SimpleNamespace(gather=gather)


def fill(found: Predictions, images, labels, first=0):
    """Logits whose best class is the label, but for every third image the next one; surer with each image."""
    n = len(labels)
    labels = torch.from_numpy(labels.astype(np.int64))
    place = torch.arange(first, first + n)
    logits = torch.zeros(n, 10)
    answer = torch.where(place % 3 == 0, (labels + 1) % 10, labels)
    logits[torch.arange(n), answer] = 1 + place / 100
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    pixels = torch.from_numpy(images.copy())[:, None].expand(-1, 3, -1, -1)
    found.add(
        pixels, logits, losses.double(), labels, torch.ones(n), place, [f"i{p}" for p in place.tolist()]
    )
    return labels, answer


def predictions(batches):
    found = Predictions(loads(CONFIG).config.augment)
    first = 0
    for images, labels in batches:
        fill(found, images, labels, first)
        first += len(labels)
    return found.gather(Exchange(1).of(0))


def test_an_evaluation_keeps_mistakes_and_its_worst_and_best_images():
    images, labels = fashion(60)
    found = predictions([(images[:25], labels[:25]), (images[25:], labels[25:])])
    wrong = [int(label) for n, label in enumerate(labels) if n % 3 == 0]
    assert found["images"] == 60
    assert sum(n for _, _, n in found["pairs"]) == len(wrong) == 20
    assert {(a, b): n for a, b, n in found["pairs"]} == {
        (c, (c + 1) % 10): wrong.count(c) for c in set(wrong)
    }
    assert [tuple(row) for row in found["classes"]] == [
        (c, int((labels == c).sum()), int((labels == c).sum()) - wrong.count(c)) for c in range(10)
    ]
    assert len(found["worst"]) == len(found["best"]) == 12
    # Later images are surer, and so more wrong: the last of either kind are there, as far as their classes differ.
    assert found["worst"][0]["position"] == 57 and found["best"][0]["position"] == 59
    assert all(item["position"] % 3 == 0 for item in found["worst"])
    assert all(item["label"] == item["predicted"] == labels[item["position"]] for item in found["best"])
    assert found["worst"][0]["name"] == "i57" and found["worst"][0]["picture"].startswith(
        "data:image/png;base64,"
    )


def test_ranks_find_together_what_one_finds_alone():
    images, labels = fashion(60)
    alone = predictions([(images, labels)])
    parts = [Predictions(loads(CONFIG).config.augment) for _ in range(2)]
    for first in range(0, 60, 10):
        fill(parts[first // 10 % 2], images[first : first + 10], labels[first : first + 10], first)

    exchange = Exchange(2)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda rank: parts[rank].gather(exchange.of(rank)), range(2)))
    assert together == [alone, alone]


def test_a_curve_has_few_points_and_loses_no_extreme():
    found = [(n, float(n % 100 == 50)) for n in range(1, 100_001)]
    curve = curves.thinned(found, 100)
    assert len(curve["step"]) <= curves.POINTS and curve["step"][-1] == 100_000
    assert max(curve["high"]) == 100 and curve["low"] == [0.0] * len(curve["step"])
    assert np.mean(curve["value"]) == pytest.approx(1, rel=0.02)
    assert curves.thinned([(1, 2.0), (2, 4.0)]) == {"step": [1, 2], "value": [2.0, 4.0]}
    assert curves.values([{"step": 1, "loss": None}, {"step": 2, "loss": 3}, {"step": 3}], "loss") == [
        (2, 3.0)
    ]


def test_the_time_line_of_a_run_that_was_killed_rolled_back_and_finished(tmp_path):
    found = timeline.attempts(events.read(run_folder(tmp_path / "run")))
    assert [(a["how"], a["start"], a["end"], a["first_step"], a["last_step"], a["nodes"]) for a in found] == [
        ("killed", 100, 170, 0, 50, ["n1", "n2"]),
        ("finished", 300, 401, 50, 120, ["n3"]),
    ]
    assert timeline.restarts(found) == [
        {"step": 50, "text": "restart after: killed"},
        {"step": 55, "text": "rolled back at step 55 to the weights of step 50"},
    ]
    assert timeline.trained_s(found) == 70 + 101


def test_jobs_say_on_which_nodes_and_what_ended_them():
    def start(t, step):
        return {
            "time": t,
            "event": "start",
            "step": step,
            "world": 8,
            "nodes": ["a", "b"],
            "device": "cuda:0",
            "job": "7",
        }

    own = [start(12, 0), {"time": 20, "event": "save", "step": 10}, start(52, 10),
           {"time": 90, "event": "end", "step": 30, "status": "preempted"}]  # fmt: skip
    jobs = [
        {"time": 5, "event": "submit", "job": "7"},
        {"time": 10, "event": "begin", "job": "7", "nodes": ["a", "b"], "checkpoint": None},
        {
            "time": 30,
            "event": "end",
            "job": "7",
            "reason": "crashed",
            "detail": "Killed",
            "node": "b",
            "action": "again",
        },
        {"time": 50, "event": "begin", "job": "7", "nodes": ["a", "c"], "checkpoint": 10},
        {
            "time": 91,
            "event": "end",
            "job": "7",
            "reason": "time limit",
            "detail": "saved at step 30",
            "node": None,
        },
        {"time": 92, "event": "begin", "job": "8", "nodes": ["d"], "checkpoint": 30},
        {"time": 93, "event": "warning", "job": "8", "text": "no follow-up"},
    ]
    found = timeline.attempts(own, jobs, alive=True)
    assert [(a["how"], a["why"], a["began"], a["nodes"]) for a in found] == [
        ("crashed", "Killed on b", True, ["a", "b"]),
        ("time limit", "saved at step 30", True, ["a", "b"]),
        ("", "", False, ["d"]),
    ]
    assert [mark["text"] for mark in found[2]["marks"]] == ["no follow-up"]
    assert timeline.attempts(own, jobs)[-1]["how"] == "killed"


def test_a_run_of_an_older_version_has_its_starts():
    starts = [{"time": "2026-01-02T03:04:05+00:00", "host": "old", "world": 1, "slurm_job": None}]
    (found,) = timeline.attempts([], [], starts)
    assert found["nodes"] == ["old"] and found["start"] == 1767323045
    both = timeline.attempts([{"time": 1767323050.0, "event": "start", "step": 0}], [], starts)
    assert len(both) == 1  # the same start, written down twice


def test_settings_say_where_they_came_from():
    config = loads("model: {name: dat_atto}\noptim: {lr: 0.5}\ndata: {train: 's3://me:secret@b/x'}\n").config
    text = (
        "model:\n  name: dat_atto\noptim:\n  lr: 0.5  # of 280 images # small\ndata:\n  train: 's3://a # b'\n"
    )
    rows = {
        key: rest
        for key, *rest in settings.rows(config, text, ["dattrain", "train", "mine.yaml", "data.train=x"])
    }
    assert rows["optim.lr"] == ["0.5", "of 280 images # small"]
    assert rows["model.name"] == ["dat_atto", "mine.yaml"]
    assert rows["data.train"][1] == "command line" and "secret" not in rows["data.train"][0]
    assert rows["optim.clip"] == ["5.0", "default"]


class Parsed(HTMLParser):
    """Cells of the summary, the JSON, and everything that could be a request."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.wanted, self.policy, self._in = [], [], "", ""
        self.json = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self._in = tag if known.get("id") != "data" else "data"
        if known.get("http-equiv") == "Content-Security-Policy":
            self.policy = known["content"]
        self.wanted += [
            value for key, value in known.items() if key in ("src", "href", "data", "action", "srcset")
        ]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in in ("td", "th"):
            self.cells[-1] += data
        if self._in == "data":
            self.json += data


def test_the_page_holds_the_numbers_and_asks_for_nothing(tmp_path, capsys):
    run = run_folder(tmp_path / "</script><b>run")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    assert cli.main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    parsed = Parsed(text)
    cells = dict(zip(parsed.cells[::2], parsed.cells[1::2]))
    assert cells["best top1"] == "60.00 % at step 120" and cells["state"] == "finished"
    assert cells["trained"] == "120 updates of 1,024 images, 4.00 epochs"
    assert cells["time"] == "2:51 in 2 attempts" and cells["trouble"] == "1 updates not finite, 1 rollbacks"
    assert not re.search(
        r"https?:|url\(|@import|//[a-z]+\.", re.sub(r"data:image[^\"]*", "", text).replace(" // ", "")
    )
    assert parsed.wanted == [] and "default-src 'none'" in parsed.policy
    (shown,) = json.loads(parsed.json)["runs"]
    loss = next(panel for panel in shown["panels"] if panel["title"] == "Loss")["curves"]
    assert [curve["name"] for curve in loss] == ["training", "evaluation"]
    assert loss[0]["step"] == list(range(1, 121)) and loss[0]["value"][1] == 1.0
    norm = next(panel for panel in shown["panels"] if panel["title"] == "Gradient norm")["curves"][0]
    assert len(norm["step"]) == 119  # one was not finite
    assert shown["confusion"]["wrong"] == 20 and shown["images"]["worst"][0]["label"] in NAMES
    assert "best top1" in capsys.readouterr().out
    assert (run / "results.png").read_bytes()[1:4] == b"PNG"


def test_several_runs_stand_side_by_side_with_what_differs(tmp_path, capsys):
    first, second = (run_folder(tmp_path / name, lr=lr) for name, lr in (("a", 0.1), ("b", 0.2)))
    assert cli.main(["report", str(first), str(second)]) == 2
    assert "name it with --out" in capsys.readouterr().err
    out = tmp_path / "pages" / "both.html"
    assert cli.main(["report", str(tmp_path), "--out", str(out)]) == 0
    data = json.loads(Parsed(out.read_text()).json)
    assert [run["title"] for run in data["runs"]] == ["a", "b"]
    assert data["differing"] == [["optim.lr", "0.1", "0.2"]]
    assert out.with_suffix(".png").is_file()
    assert cli.main(["report", str(tmp_path / "pages")]) == 2
    assert "no run folder" in capsys.readouterr().err


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def dom(file: Path, profile: Path) -> str:
    """The document once its script has run."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
               "--window-size=1280,2000", "--virtual-time-budget=5000", "--dump-dom", file.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
def test_a_browser_draws_curves_and_pictures_and_requests_nothing(tmp_path):
    run = run_folder(tmp_path / "run")
    found = json.loads((run / "predictions.json").read_text())
    block = {"label": "stage 3, block 1", "groups": [[[500, 500, 20]], [[100, 900, 30], [5, 5, 5]]]}
    for item in found["worst"]:
        item["points"] = [block]
    (run / "predictions.json").write_text(
        json.dumps({**found, "points_of": "step_00000120", "colours": ["#ff5a36", "#18a8ff"]})
    )
    assert cli.main(["report", str(run)]) == 0
    drawn = dom(run / "report.html", tmp_path / "profile")
    assert 'data-drawn="yes"' in drawn
    paths = re.findall(r'<path d="([^"]+)" class="curve"', drawn)
    # Loss and accuracy have two curves each, the other four panels one.
    assert len(paths) == 8 and all(path.count("L") >= 3 for path in paths) and "NaN" not in "".join(paths)
    assert paths[0].count("L") == 119
    # Set when the browser has decoded a picture, as the points are drawn then.
    assert drawn.count('class="small"') == 24
    assert drawn.count('fill="#18a8ff"') == 2 * 12 and drawn.count('fill="#ff5a36"') == 12
    assert drawn.count('class="bar trouble"') == 1 and drawn.count('class="tick rollback"') == 1

    # Were anything in the page to ask for something, the policy in its head would keep it from leaving.
    asked = {}
    for name, policy in (("with", True), ("without", False)):
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(20)
            port = server.getsockname()[1]
            calls: list[bytes] = []
            thread = threading.Thread(target=_answer, args=(server, calls), daemon=True)
            thread.start()
            text = (run / "report.html").read_text()
            text = text.replace("<main", f'<img src="http://127.0.0.1:{port}/asked.png"><main')
            (tmp_path / f"{name}.html").write_text(
                text if policy else re.sub(r"<meta http-equiv[^>]+>", "", text)
            )
            dom(tmp_path / f"{name}.html", tmp_path / f"profile-{name}")
        thread.join(1)
        asked[name] = any(b"asked.png" in call for call in calls)
    assert asked == {"with": False, "without": True}


def _answer(server, calls):
    try:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(5)
                calls.append(connection.recv(4096))
                connection.sendall(
                    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
    except OSError:
        pass


def test_a_page_that_cannot_be_written_is_said_and_ends_nothing(tmp_path, caplog):
    run = run_folder(tmp_path / "run")
    (run / "report.html").mkdir()
    training.LivePage(lambda run_dir: [])(run)
    assert any("report.html: not written" in message for message in caplog.messages)


def test_an_expensive_page_is_not_written_at_every_evaluation(tmp_path):
    run = run_folder(tmp_path / "run")
    times = iter([0.0, 2.0, 100.0, 300.0, 302.0])
    live = training.LivePage(lambda run_dir: [], clock=lambda: next(times))
    written = []
    for _ in range(3):
        (run / "report.html").unlink(missing_ok=True)
        live(run)
        written.append((run / "report.html").exists())
    # It took 2 s: 98 s later is too early, 298 s is not.
    assert written == [True, False, True]


def _train(monkeypatch, run, status):
    """A training that ends so, around which the pages are written."""

    def engine(config, run_dir, *, env, on_evaluation):
        if status == "refused":
            raise UserError("another process has the folder")
        events.record(run_dir, "start", step=120, world=1, nodes=["n4"])
        on_evaluation(run_dir)
        assert summary(run)["state"] == "running"
        if status == "failed":
            events.record(run_dir, "end", step=121, status="failed", error="no finite step")
            raise UserError("no finite step")
        events.record(run_dir, "end", step=121, status=status)
        return SimpleNamespace(status=status)

    monkeypatch.setattr(training.training, "train", engine)
    env = SimpleNamespace(rank=0)
    training.train(loads(CONFIG).config, run, lambda run_dir: [], env=env)


def summary(run):
    cells = Parsed((run / "report.html").read_text()).cells
    return dict(zip(cells[::2], cells[1::2]))


def test_the_page_says_how_the_training_ended(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run")
    with pytest.raises(UserError):
        _train(monkeypatch, run, "refused")
    assert not (run / "report.html").exists()
    with pytest.raises(UserError):
        _train(monkeypatch, run, "failed")
    assert summary(run)["state"] == "failed: no finite step"
    _train(monkeypatch, run, "preempted")
    # A job that is to end has no time for pictures.
    assert summary(run)["state"] == "preempted" and not (run / "results.png").exists()
