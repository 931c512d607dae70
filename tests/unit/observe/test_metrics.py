import json
import math
import resource

from dattrain.observe.metrics import Metrics, read, rewind


def test_rows_are_json_and_not_finite_numbers_are_null(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 1, "loss": 2.5, "grad_norm": math.inf})
    metrics.write({"step": 2, "loss": math.nan})
    # Flushed line by line: a kill loses nothing.
    assert read(tmp_path) == [
        {"step": 1, "loss": 2.5, "grad_norm": None},
        {"step": 2, "loss": None},
    ]
    metrics.close()


def test_a_resume_forgets_what_was_trained_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 8)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "lo')
    metrics = Metrics(tmp_path, 4)
    assert metrics.logged == 7  # which services have had
    metrics.write({"step": 5, "loss": 9.0})
    metrics.close()
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 3, 4, 5]
    assert path.read_text().splitlines()[:4] == lines[:4]
    assert (tmp_path / "metrics.replaced.jsonl").read_text().splitlines() == lines[4:]


def test_a_run_that_starts_over_says_so_and_keeps_what_it_had_every_time(tmp_path, caplog):
    for attempt in (1, 2):
        metrics = Metrics(tmp_path, 0)
        assert metrics.logged == 0
        (tmp_path / "tensorboard").mkdir()
        (tmp_path / "tensorboard" / f"events-{attempt}").touch()
        for step in (1, 2, 3):
            metrics.write({"step": step, "attempt": attempt})
        metrics.close()
    Metrics(tmp_path, 0).close()
    assert read(tmp_path) == []
    kept = [json.loads(line) for line in (tmp_path / "metrics.replaced.jsonl").read_text().splitlines()]
    assert [(row["attempt"], row["step"]) for row in kept] == [(a, s) for a in (1, 2) for s in (1, 2, 3)]
    assert [len(list((tmp_path / f"tensorboard.replaced-{n}").iterdir())) for n in (1, 2)] == [1, 1]
    assert caplog.messages == [
        "metrics.jsonl has rows up to step 3, but there is no checkpoint of any: starting from step 0; its rows are moved to "
        f"metrics.replaced.jsonl, and tensorboard/ is now tensorboard.replaced-{n}/"
        for n in (1, 2)
    ]


def test_rewinding_to_where_it_is_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n')
    before = path.stat().st_ino
    rewind(path, 1)
    assert path.stat().st_ino == before


def test_a_disk_that_takes_no_rows_for_a_while_ends_no_training(tmp_path, caplog):
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.path.stat().st_size + 4, limits[1]))
        metrics.write({"step": 2})
        metrics.write({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.write({"step": 4})
    metrics.close()
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 3, 4]
    assert caplog.messages == [
        f"{metrics.path} cannot be written (EFBIG: File too large); training continues"
    ]
