"""``dattrain eval`` on real images: figures, views, test sets, probes, comparison, and two ranks."""

from __future__ import annotations

import csv
import json
import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import warm
from fashion_images import fashion, image_folder

from dattrain.cli import main as cli
from dattrain.config.load import dump
from dattrain.config.schema import Config
from dattrain.data import labels
from dattrain.data.prepare.pack import PackOptions, pack
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import UserError
from dattrain.evaluation import inference, metrics, probe, test_sets
from dattrain.pretrained import class_names, preprocess, weights
from dattrain.pretrained.pretrained_cfg import PretrainedCfg


def evaluated(tmp_path, *arguments):
    report = tmp_path / "report.json"
    assert (
        cli.main(["eval", *map(str, arguments), "--workers", "0", "--batch", "32", "--json", str(report)])
        == 0
    )
    return json.loads(report.read_text())


def expected_top1(model, cfg, folder, views=lambda x: [x]):
    """The same figure by hand: decode, normalise, average, count."""
    names, right, total = sorted(p.name for p in folder.iterdir()), 0, 0
    for label, name in enumerate(names):
        for file in sorted((folder / name).iterdir()):
            x = preprocess.normalise(preprocess.prepare(preprocess.read(file), cfg)[None], cfg)
            with torch.no_grad():
                p = sum(model(view).softmax(1) for view in views(x))
            right, total = right + int(p.argmax() == label), total + 1
    return 100 * right / total


def test_figures_are_those_counted_by_hand(tmp_path, atto, cfg, weights_file, val_folder):
    report = evaluated(tmp_path, weights_file, "--data", val_folder)
    assert report["images"] == 60 and report["bad"] == 0
    assert report["top1"] == pytest.approx(expected_top1(atto, cfg, val_folder))
    assert report["top1_low"] <= report["top1"] <= report["top1_high"]
    flipped = evaluated(tmp_path, weights_file, "--data", val_folder, "--flip")
    assert flipped["top1"] == pytest.approx(expected_top1(atto, cfg, val_folder, lambda x: [x, x.flip(-1)]))
    assert flipped["views"] == 2


def test_a_bad_image_is_an_error_or_left_out_as_asked(tmp_path, weights_file, capsys):
    folder = image_folder(tmp_path / "val", 20)
    (next(folder.iterdir()) / "bad.png").write_bytes(b"no image")
    command = ["eval", str(weights_file), "--data", str(folder), "--workers", "0"]
    assert cli.main(command) == 1
    assert "bad.png" in (message := capsys.readouterr().err) and "--on-bad skip" in message
    report = evaluated(tmp_path, weights_file, "--data", folder, "--on-bad", "skip")
    assert (report["images"], report["bad"]) == (20, 1)


def test_remote_shards_are_evaluated_through_a_cache(tmp_path, weights_file, val_folder, capsys):
    pack(open_dataset(str(val_folder)), tmp_path / "shards", PackOptions(split="val"))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "shards")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/val-0000.tar"
        assert cli.main(["eval", str(weights_file), "--data", url]) == 2
        assert "--cache-dir" in capsys.readouterr().err
        report = evaluated(tmp_path, weights_file, "--data", url, "--cache-dir", tmp_path / "cache")
        server.shutdown()
    assert report["top1"] == evaluated(tmp_path, weights_file, "--data", val_folder)["top1"]


def test_five_crops_are_corners_and_centre():
    image = torch.arange(36.0).reshape(1, 1, 6, 6)
    views = list(inference.Views(flip=True, crops=5)(image, (4, 4)))
    assert len(views) == 10
    assert [int(view[0, 0, 0, 0]) for view in views[::2]] == [7, 0, 2, 12, 14]
    assert all(torch.equal(flipped, view.flip(-1)) for view, flipped in zip(views[::2], views[1::2]))


def test_five_crops_need_a_margin(tmp_path, weights_file, val_folder, capsys):
    assert (
        cli.main(["eval", str(weights_file), "--data", str(val_folder), "--crops", "5", "--workers", "0"])
        == 1
    )
    assert "crop_pct" in capsys.readouterr().err
    report = evaluated(tmp_path, weights_file, "--data", val_folder, "--crops", "5", "--crop-pct", "0.875")
    assert report["views"] == 5 and report["images"] == 60


def test_tables_and_pictures(tmp_path, weights_file, val_folder):
    report = evaluated(tmp_path, weights_file, "--data", val_folder, "--csv", tmp_path / "out")
    read = lambda name: list(csv.DictReader(open(tmp_path / "out" / name)))  # noqa: E731, SIM115
    per_class, cells, images = read("per_class.csv"), read("confusion.csv"), read("predictions.csv")
    assert sum(int(row["images"]) for row in per_class) == 60
    assert {row["name"] for row in per_class} <= set(
        class_names.names(10, known=sorted(p.name for p in val_folder.iterdir()))
    )
    right = sum(int(row["images"]) for row in cells if row["label"] == row["predicted"])
    assert 100 * right / 60 == pytest.approx(report["top1"])
    assert sum(int(row["right"]) for row in images) == right
    assert len({row["image"] for row in images}) == 60
    for name in ("confusion.png", "reliability.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_another_size_is_laid_out_anew(tmp_path, weights_file, val_folder):
    report = evaluated(tmp_path, weights_file, "--data", val_folder, "--img-size", "96", "64")
    assert report["img_size"] == [96, 64]
    sampled = evaluated(
        tmp_path, weights_file, "--data", val_folder, "--img-size", "96", "--bias-table", "sample"
    )
    assert sampled["img_size"] == [96, 96]


def test_several_models_in_one_table(tmp_path, atto, cfg, weights_file, val_folder, capsys):
    other = tmp_path / "other.safetensors"
    changed = {n: torch.zeros_like(t) if n.startswith("head.fc") else t for n, t in atto.state_dict().items()}
    weights.save(other, changed, cfg)
    report = evaluated(tmp_path, weights_file, "--data", val_folder, "--compare", other, weights_file)
    assert [m["model"] for m in report["models"]] == [str(weights_file), str(other), str(weights_file)]
    lines = capsys.readouterr().out.strip().splitlines()[-3:]
    assert lines[2].endswith("+0.00 (+0.00 to +0.00)")
    gain = report["models"][1]["top1"] - report["models"][0]["top1"]
    assert f"{gain:+.2f} (" in lines[1]


def test_probes_beat_chance_on_an_untrained_network(tmp_path, weights_file, val_folder, train_folder):
    report = evaluated(
        tmp_path, weights_file, "--data", val_folder, "--train", train_folder, "--knn", "5", "--linear-probe"
    )
    assert report["knn_k"] == 5 and report["train_images"] == 300
    assert report["knn_top1"] > 30 and report["linear_top1"] > 30


def test_a_run_folder_brings_its_data_and_settings(tmp_path, atto, cfg, val_folder):
    # The checkpoint itself is read by tests of weights; here a run's config beside exported weights.
    run = tmp_path / "run"
    run.mkdir()
    config = Config.model_validate(
        {"model": {"name": "dat_atto", "num_classes": 10, "img_size": 64}, "data": {"val": str(val_folder)}}
    )
    (run / "config.yaml").write_text(dump(config))
    assert weights.config_of(run) == config
    assert weights.config_of(run / "nowhere.safetensors") is None


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--labels", "real"], "needs --data", 2),
        (["--batch", "0"], "--batch", 2),
        (["--crop-pct", "1.5"], "--crop-pct", 2),
        (["--knn", "0"], "--knn", 2),
        (
            ["--bias-table", "sample"],
            "(--bias-table) is of another img_size",
            2,
        ),
        ([], "give --data", 2),
    ],
)
def test_usage_errors(weights_file, capsys, arguments, message, code):
    assert cli.main(["eval", str(weights_file), *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_missing_model_is_named(capsys):
    assert cli.main(["eval", "no/such/run"]) == 1
    assert "no/such/run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A 1,000-class model of few parameters."""
    from dattrain.models import create

    torch.manual_seed(1)
    tiny = {
        "dims": (16, 16, 32, 32),
        "heads": (1, 1, 2, 2),
        "groups": (1, 1, 1, 1),
        "blocks": ("L", "L", "D", "D"),
    }
    cfg = PretrainedCfg("dat_atto", 1000, (32, 32), overrides=tiny, crop_pct=1.0, labels="imagenet-1k")
    path = tmp_path_factory.mktemp("weights") / "thousand.safetensors"
    weights.save(path, create("dat_atto", num_classes=1000, img_size=32, **tiny).state_dict(), cfg)
    return path


def test_imagenet_a_counts_its_200_classes_alone(tmp_path, thousand):
    synsets = labels.packaged("imagenet_a_synsets.txt")
    names = tuple(synsets[i] for i in range(0, 200, 20))
    folder = image_folder(tmp_path / "a", 30, names=names)
    report = evaluated(
        tmp_path, thousand, "--data", folder, "--labels", "imagenet-a", "--csv", tmp_path / "out"
    )
    order = list(labels.label_set("imagenet-1k").synsets)
    allowed = {order.index(s) for s in synsets}
    rows = list(csv.DictReader(open(tmp_path / "out/predictions.csv")))  # noqa: SIM115
    assert len(rows) == report["images"] == 30
    assert all({int(row[f"top{k}"]) for k in range(1, 6)} <= allowed for row in rows)
    image_folder(tmp_path / "a", 3, names=("n01440764",) * 10)
    assert cli.main(["eval", str(thousand), "--data", str(folder), "--labels", "imagenet-a"]) == 1


def test_imagenet_c_is_tabled_by_corruption(tmp_path, thousand):
    synsets = labels.label_set("imagenet-1k").synsets[:10]
    for corruption in ("fog", "snow"):
        for severity in "15":
            image_folder(tmp_path / "c" / corruption / severity, 12, names=synsets)
    report = evaluated(tmp_path, thousand, "--data", tmp_path / "c", "--labels", "imagenet-c")
    assert [row["corruption"] for row in report["corruptions"]] == ["fog", "snow"]
    fog = report["corruptions"][0]
    assert fog["ce"] == pytest.approx(100 * (100 - fog["top1"]) / 81.9)
    assert report["mce"] is None


def test_alexnet_itself_has_an_mce_of_one_hundred():
    top1 = {f"{c}/{s}": 100 - error for c, error in test_sets.ALEXNET_ERROR.items() for s in range(1, 6)}
    assert test_sets.mean_corruption_error(test_sets.corruption_table(top1)) == pytest.approx(100)


def test_imagenet_v2_numbers_its_folders(tmp_path, thousand, capsys):
    for i in range(1000):
        (tmp_path / "v2" / str(i)).mkdir(parents=True)
    cfg = weights.load_model(thousand)[1]
    (part,) = test_sets.parts("imagenet-v2", str(tmp_path / "v2"), cfg)
    assert part.among is None
    (tmp_path / "v2" / "7").rmdir()
    with pytest.raises(UserError, match="0 to 999"):
        test_sets.parts("imagenet-v2", str(tmp_path / "v2"), cfg)


def test_real_accepts_any_right_answer(tmp_path, thousand):
    cfg = weights.load_model(thousand)[1]
    keys = [
        "val:n01751748/ILSVRC2012_val_00000001.JPEG",
        "s.tar:ILSVRC2012_val_00000002",
        "x:ILSVRC2012_val_00050000",
    ]
    answers = test_sets.real_answers(keys, cfg)
    # The second validation image is a skier (795); of the first, ReaL's annotators agreed on nothing.
    assert answers[0] == frozenset() and 795 in answers[1] and len(answers) == 3
    with pytest.raises(UserError, match="under their own names"):
        test_sets.real_answers(["val:n01751748/cat.jpg"], cfg)
    with pytest.raises(UserError, match="10 classes"):
        test_sets.real_answers(keys, PretrainedCfg("dat_atto", 10, (64, 64)))
    with pytest.raises(UserError, match=r"not called by synset \(tench 0, tench 1, tench 2, ...\)"):
        names = tuple(f"tench {i}" for i in range(1000))
        test_sets.real_answers(keys, PretrainedCfg("dat_atto", 1000, (64, 64), classes=names))


def test_knn_votes_by_weighted_similarity():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    votes = probe.knn(train, torch.tensor([0, 0, 1]), torch.tensor([[5.0, 0.1], [0.0, 2.0]]), classes=3, k=3)
    assert votes.argmax(1).tolist() == [0, 1] and torch.allclose(votes.sum(1), torch.ones(2))


def test_linear_probe_separates_what_a_line_separates():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1]) + 3
    y = (x @ torch.tensor([1.0, 0.3, -4.0, 0.0, 0.0]) > -8).long()
    layer, decay = probe.linear_probe(x, y, classes=2)
    assert float((layer(x).argmax(1) == y).float().mean()) > 0.98 and decay <= 1e-3
    with pytest.raises(UserError, match="two classes"):
        probe.linear_probe(x, torch.zeros(400, dtype=torch.long), classes=2)


def test_two_ranks_report_what_one_does(tmp_path, weights_file, val_folder):
    one = evaluated(tmp_path, weights_file, "--data", val_folder)
    report = tmp_path / "two.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dattrain",
    ]
    command += [
        "eval",
        str(weights_file),
        "--data",
        str(val_folder),
        "--workers",
        "0",
        "--batch",
        "7",
        "--json",
        str(report),
    ]
    done = warm.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(report.read_text())
    for key in ("top1", "top5", "loss", "ece", "images"):
        assert two[key] == pytest.approx(one[key]), key
    assert done.stdout.count("top-1") == 1


def test_scores_of_the_label_minus_one_are_left_out():
    images, _ = fashion(4)
    p = torch.full((4, 3), 1 / 3)
    kept = metrics.record(p, torch.tensor([0, -1, 1, -1]), torch.arange(len(images)))
    assert np.isnan(kept.nll).sum() == 2
