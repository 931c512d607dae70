"""Reading recipes: merging, numbers, the origin of values, and one clear message for each mistake."""

from pathlib import Path

import pytest

from dattrain.cli import main as cli
from dattrain.config import reference
from dattrain.config.derive import derive, micro_batch
from dattrain.config.load import diff, dump, load, loads, origin, show
from dattrain.errors import ConfigError


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "base.yaml").write_text(
        "name: base\noptim:\n  lr: 1e-4\n  clip: 1\nmodel: {overrides: {a: 1}}\n"
    )
    path = tmp_path / "child.yaml"
    path.write_text("extends: base.yaml\nname: child\noptim:\n  eps: 1e-6\nmodel: {overrides: {b: 2}}\n")
    return path


def test_extends_merges_sections_and_overrides_win(recipe):
    config = load(recipe, ["optim.lr=2E-5", "init.from=runs/a", "model.img_size=[224, 256]"]).config
    assert (config.name, config.optim.lr, config.optim.clip, config.optim.eps) == ("child", 2e-5, 1.0, 1e-6)
    assert config.model.overrides == {"a": 1, "b": 2}
    assert config.init.from_ == "runs/a" and config.model.img_size == (224, 256)


def test_every_value_knows_where_it_came_from(recipe):
    shown = show(load(recipe, ["optim.clip=3"]))
    places = {line.split(":")[0]: line.rsplit("# ", 1)[1] for line in shown.splitlines()}
    base = recipe.parent / "base.yaml"
    assert places["optim.lr"] in (f"{base}:3", f"{base.resolve()}:3")
    assert places["optim.eps"] == f"{recipe}:4"
    assert places["optim.clip"] == "command line" and places["optim.betas"] == "default"


def test_dump_is_read_back_equal(recipe):
    config = load(recipe, ["train.progressive=[{epoch: 1, img_size: 96}]", "init.from=x"]).config
    assert loads(dump(config)).config == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1e3),
        ("-.5e+2", -50.0),
        ("1.", 1.0),
        ("7", 7),
        ("on", "on"),
        ("true", True),
        ("1e", "1e"),
    ],
)
def test_scalars_mean_what_a_researcher_reads(text, value):
    loaded = loads(f"model: {{overrides: {{x: {text}}}}}").config.model.overrides["x"]
    assert loaded == value and type(loaded) is type(value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optm.lr=1", "command line: unknown key optm; did you mean optim?"),
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("optim.lr=-1", "command line: optim.lr"),
        ("optim.lr=fast", "found 'fast'"),
        ("train.micro_batch=some", "train.micro_batch"),
        ("augment.mix_group=7", "multiple of 2"),
        ("augment.mix_group=768", "augment.mix_group=768 does not divide train.global_batch=1024"),
        ("model.img_size=100", "multiple of 32"),
        ("model.in_chans=4", "the data gives 3"),
        ("optim.lr", "not of the form"),
        ("train.remet=block", "did you mean train.activation_checkpointing?"),
        ("train={remet: block}", "did you mean train.activation_checkpointing?"),
        ("train.progressive=[{epoh: 1, img_size: 96}]", "train.progressive.0.epoch"),
        ("optim.lr=.nan", "optim.lr"),
        ("model.overrides={img_size: 96}", "set model.img_size"),
    ],
)
def test_mistakes_on_the_command_line(recipe, override, says):
    with pytest.raises(ConfigError) as error:
        load(recipe, [override])
    assert says in str(error.value) and error.value.exit_code == 2


@pytest.mark.parametrize("precision", ["fp16", "bf16-pure"])
def test_stage_0_is_refused_where_deepspeed_trains_wrongly(recipe, precision):
    with pytest.raises(ConfigError, match="zero.stage=0"):
        load(recipe, ["zero.stage=0", f"train.precision={precision}"])


def test_readers_that_cannot_fetch_a_partner_refuse_groups_beyond_the_micro_batch(recipe):
    given = ["augment.mix_group=256", "data.samples=9"]
    assert load(recipe, given).config.augment.group == 256
    assert load(recipe, [*given, "augment.mix_prob=0", "data.reader=webdataset"]).config.augment.group == 1
    with pytest.raises(
        ConfigError, match="train.micro_batch=128 on 2 devices leaves no number.*mix_group=256"
    ):
        micro_batch(load(recipe, [*given, "data.reader=webdataset"]).config, 2)
    fits = load(
        recipe, ["augment.mix_group=24", "data.samples=9", "data.reader=webdataset", "train.global_batch=96"]
    )
    assert micro_batch(fits.config, 1) == 96 and micro_batch(fits.config, 2) == 48


def test_tf32_is_a_way_to_compute_in_fp32(recipe):
    assert load(recipe, ["train.tf32=true", "train.precision=fp32"]).config.train.tf32
    for precision in ("bf16", "bf16-pure", "fp16"):
        with pytest.raises(ConfigError, match=f"train.precision={precision}.*use train.precision=fp32"):
            load(recipe, ["train.tf32=true", f"train.precision={precision}"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.compile=none"], "needs train.compile"),
        (["train.compile=block", "zero.stage=1"], "needs zero.stage=2"),
        (["train.compile=block", "train.activation_checkpointing=block"], "use none or selective"),
        (["train.compile=stage", "train.activation_checkpointing=stage"], "or block"),
    ],
)
def test_cuda_graphs_are_refused_where_their_memory_would_be_read_too_late(recipe, overrides, says):
    with pytest.raises(ConfigError, match=says):
        load(
            recipe,
            ["zero.stage=2", "train.activation_checkpointing=none", *overrides, "train.cuda_graphs=true"],
        )
    load(
        recipe,
        [
            "zero.stage=2",
            "train.compile=stage",
            "train.activation_checkpointing=block",
            "train.cuda_graphs=true",
        ],
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", ":3: optim.lr is set twice"),
        ("optim: [\n", "not YAML"),
        ("- a\n", ":1: a config is a mapping"),
        (
            "name: x\noptim:\n  weight_decy: 1\n",
            ":3: unknown key optim.weight_decy; did you mean optim.weight_decay?",
        ),
        ("extends: nowhere.yaml\n", "no such config"),
        ("extends: [3]\n", "must be a file"),
    ],
)
def test_mistakes_in_a_file_name_file_and_line(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert says in str(error.value) and "bad.yaml" in str(error.value)


def test_settings_of_a_mapping_are_values_and_are_called_so(recipe):
    given = {"optim.lr": 2e-5, "init.from": "1e-3", "model": {"overrides": {"b": None}}}
    loaded = load(recipe, given)
    assert (loaded.config.optim.lr, loaded.config.init.from_) == (2e-5, "1e-3")
    assert loaded.config.model.overrides == {"a": 1, "b": None}
    assert origin(loaded, "init.from") == "settings given"
    with pytest.raises(ConfigError, match=r"^settings given: optim.lr: .*found 'fast'"):
        load(recipe, {"optim.lr": "fast"})


def test_a_text_extends_shipped_recipes_and_files_here(recipe, monkeypatch):
    assert loads("extends: demo/pretrain\ntrain: {seed: 3}\n").config.model.name == "dat_atto"
    monkeypatch.chdir(recipe.parent)
    assert loads("extends: child.yaml\n").config.optim.eps == 1e-6
    with pytest.raises(ConfigError, match="^<text>:1: extends: .*no such config.*did you mean demo/pretrain"):
        loads("extends: demo/pretrian\n")


def test_a_run_folder_is_loaded_and_an_empty_name_is_none(recipe, capsys):
    (recipe.parent / "config.yaml").write_text("name: recorded\n")
    assert load(recipe.parent).config.name == "recorded"
    assert cli.main(["config", "show", ""]) == 2
    assert "'' names no recipe" in capsys.readouterr().err


def test_extends_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load(tmp_path / "a.yaml")


def test_diff_names_only_what_differs(recipe):
    rows = diff(load(recipe), load(recipe, ["optim.lr=3e-4"]))
    assert [(key, a.split()[0], b.split()[0]) for key, a, b in rows] == [("optim.lr", "0.0001", "0.0003")]


@pytest.mark.parametrize(
    ("world", "most", "taken"),
    [(1, 32, 32), (2, 32, 24), (3, 32, 32), (4, 1, 1), (1, 500, 96), (2, "auto", 48)],
)
def test_the_largest_micro_batch_up_to_the_recipes_that_divides_is_taken(world, most, taken):
    config = loads(f"train: {{global_batch: 96, micro_batch: {most}}}").config
    derived = derive(config, world=world, samples_per_epoch=1000)
    assert derived.micro_batch == taken and derived.micro_batch * derived.accumulation * world == 96


def test_a_fast_dev_run_is_two_updates_with_everything_at_its_end():
    config = loads("train: {global_batch: 10, fast_dev_run: true}\ncheckpoint: {every_steps: 1}").config
    derived = derive(config, world=1, samples_per_epoch=1000)
    assert (derived.last_step, derived.eval_steps, derived.checkpoint_steps) == (2, 2, 2)
    assert derived.total_steps == 30_000, "the schedule is the one of the run that is tried"


def test_derive_refuses_what_does_not_divide():
    config = loads("train: {global_batch: 96, micro_batch: 32}").config
    with pytest.raises(
        ConfigError, match=r"cannot be split over 5 devices; .*\(4\), or train.global_batch=95"
    ):
        derive(config, world=5, samples_per_epoch=1000)
    with pytest.raises(ConfigError, match="fewer than one"):
        derive(config, world=1, samples_per_epoch=95)
    derived = derive(config, world=3, samples_per_epoch=1000)
    assert derived.accumulation == 1 and derived.total_steps == 3125


def test_the_page_of_keys_is_current():
    page = Path(__file__).parents[3] / "docs" / "keys.md"
    assert page.read_text() == reference.markdown(), "dattrain config keys > docs/keys.md"


def test_a_renamed_key_is_read_and_a_line_names_the_new_one(tmp_path, caplog):
    base, recipe = tmp_path / "base.yaml", tmp_path / "recipe.yaml"
    base.write_text("train:\n  remat: block\n")
    recipe.write_text("extends: base.yaml\ntrain: {seed: 1}\n")
    loaded = load(recipe)
    assert loaded.config.train.activation_checkpointing == "block"
    assert origin(loaded, "train.activation_checkpointing") == f"{base}:2"
    assert caplog.messages == [f"{base}:2: train.remat is called train.activation_checkpointing now"]
    assert load(recipe, ["train.remat=stage"]).config.train.activation_checkpointing == "stage"
    with pytest.raises(
        ConfigError, match="remat is called train.activation_checkpointing now, and both are set"
    ):
        load(recipe, ["train.remat=stage", "train.activation_checkpointing=block"])
    assert load(recipe, ["train={remat: stage}"]).config.train.activation_checkpointing == "stage"
    base.write_text("train:\n  remat: block\n  activation_checkpointing: none\n")
    with pytest.raises(ConfigError, match="base.yaml:2: train.remat is called .* leave train.remat out"):
        load(recipe)
