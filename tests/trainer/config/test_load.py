"""Tests loading, checking and printing settings, including the error messages."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from support.processes import REPOSITORY

from trainer.config.load import find_config_file, help_text, load_config, to_yaml
from trainer.config.schema import RunConfig, settings_by_name
from trainer.config.validate import check_ranks
from trainer.errors import ConfigError, WorldError


def load(*overrides: str) -> RunConfig:
    return load_config([], overrides)


def test_later_file_or_override_takes_precedence(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {epochs: 3, precision: bf16}\noptim: {lr: 0.5}")
    second.write_text("train: {epochs: 4}")
    config = load_config([first, second], ["optim.lr=0.25"])
    assert (config.train.epochs, config.train.precision, config.optim.lr) == (4, "bf16", 0.25)
    assert config.run.name == "second"


def test_values_are_typed_and_frozen() -> None:
    config = load("optim.lr=1e-3", "data.augment=[flip, crop]", "train.max_steps=5", "data.cache_dir=null")
    assert config.optim.lr == 0.001 and config.data.augment == ["flip", "crop"]
    assert config.train.max_steps == 5 and config.data.cache_dir is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 1.0  # type: ignore[misc]


def test_auto_image_size_is_resolved_unless_weights_are_pretrained() -> None:
    assert load("data.image_size=auto") == load()
    assert load("data.image_size=auto", "model.name=vgg16", "model.pretrained=hub").data.image_size == "auto"


def test_off_no_and_exponents_keep_their_meaning(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("log: {wandb: off}\noptim: {lr: 1e-3}\nrun: {name: 'no'}")
    from_file = load_config([file], [])
    from_command_line = load("log.wandb=off", "optim.lr=1e-3", "run.name=no")
    for config in (from_file, from_command_line):
        assert (config.log.wandb, config.optim.lr, config.run.name) == ("off", 0.001, "no")


@pytest.mark.parametrize("text", ["a b", "${oc.env:HOME}", "x;rm -rf y", "ünï", "1e5", "[a", "a=b", "#c", "null"])
def test_text_setting_keeps_special_characters(text: str) -> None:
    assert load(f"run.name={text}").run.name == text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("train.epoch=3", "did you mean 'train.epochs'"),
        ("optim.epochs=3", "did you mean 'train.epochs'"),
        ("optm.lr=3", "did you mean 'optim'"),
        ("lr=3", "did you mean 'optim.lr'"),
        ("train.precision=fp64", "choose from auto, bf16, fp16, fp32"),
        ("data.name=cifar", "did you mean 'cifar10'?"),
        ("train.epochs=many", "train.epochs=many: expected a whole number"),
        ("train.epochs=1.5", "expected a whole number"),
        ("optim.lr=fast", "expected a number"),
        ("data.shuffle=perhaps", "expected true or false"),
        ("train.epochs=null", "expected a whole number"),
        ("data.augment=flip", "expected a list such as [flip, crop]"),
        ("data.augment=[flipp]", "did you mean 'flip'"),
        ("train=3", "'train' is a section, not a setting"),
        ("train.epochs", "is not a setting; expected section.key=value"),
        ("--epochs=3", "is not a setting; expected section.key=value"),
        ("data.augment=[flip", "not readable as YAML"),
        ("train.epochs=0", "train.epochs=0: expected 1 or more"),
        ("optim.lr=0", "expected more than 0"),
        ("optim.lr=nan", "expected more than 0"),
        ("optim.lr=.inf", "expected a finite number"),
        ("data.validation_fraction=0.9", "expected 0.5 or less"),
        ("train.threads_per_rank=0", "expected 1 or more, or auto"),
        ("train.threads_per_rank=two", "expected 1 or more, or auto"),
        ("data.channels=2", "choose from 1, 3, auto"),
        ("data.image_size=big", "data.image_size=big: expected 1 or more, or auto"),
        ("data.image_size=0", "expected 1 or more"),
        ("data.normalize=weights", "expected model.pretrained; set it"),
        ("model.freeze=features", "expected a list such as [features, classifier.0]"),
        ("optim.lr_parts=[fc]", "expected NAME=RATE"),
        ("optim.lr_parts=[=0.1]", "expected NAME=RATE"),
        ("optim.lr_parts=[fc=fast]", "expected NAME=RATE"),
        ("optim.lr_parts=[fc=0]", "with a rate above 0"),
        ("optim.lr_parts=[fc=.inf]", "expected NAME=RATE"),
        ("optim.lr_parts=[fc=0.1,fc=0.2]", "contains a name twice"),
        ("model.name=resnet81", "did you mean 'resnet18'"),
        ("run.name=../elsewhere", "expected the name of a folder under run.root"),
        ("run.name=.", "expected the name of a folder under run.root"),
        ("run.seed=5000000000", "expected 4294967295 or less"),
        ("run.name=/elsewhere", "expected the name of a folder under run.root"),
        ("schedule.warmup_epochs=99", "more than train.epochs=10; lower it, for example to schedule.warmup_epochs=1"),
        ("train.epochs=4 schedule.warmup_epochs=5", "for example to schedule.warmup_epochs=0.4"),
    ],
)
def test_invalid_setting_is_refused_with_one_line(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides.split())
    text = str(caught.value)
    assert message in text and "\n" not in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("loss.label_smoothing=0.1 loss.name=mse", "only cross_entropy supports it"),
        ("optim.nesterov=true optim.momentum=0", "expected sgd with a momentum above 0"),
        ("optim.nesterov=true optim.name=adamw", "expected sgd with a momentum above 0"),
        ("optim.nesterov=true optim.name=muon", "muon always uses Nesterov momentum"),
        ("optim.weight_decay=1.1 optim.name=muon", "expected 1 or less"),
        ("optim.betas=[0.9]", "expected two numbers"),
        ("optim.lr_parts=[fc=0.1] optim.lr_head=0.1", "optim.lr_head would set a second rate"),
        ("optim.lr_parts=[fc=0.1] optim.lr_vectors=0.1 optim.name=muon", "optim.lr_vectors would set a second rate"),
        ("data.progressive_sizes=[33] data.image_size=auto", "expected sizes from 1 to data.image_size=32"),
        ("data.progressive_sizes=[24,32] train.epochs=1", "more sizes than train.epochs=1"),
        ("data.progressive_sizes=[24] model.name=lenet", "lenet accepts 32 pixels only"),
        ("data.cutout_size=33 data.augment=[cutout]", "is larger than data.image_size=32"),
        ("data.augment=[flip,alternating_flip]", "use only one of them"),
        ("data.crop_padding=8 data.crop_border=reflect data.image_size=8", "reflect needs less than data.image_size=8"),
        ("eval.tta=mirror_and_shift data.image_size=1 data.crop_padding=1", "too small to shift"),
        ("model.pretrained=hub model.name=lenet", "there are no pretrained weights of lenet"),
        ("model.pretrained=hub model.name=vgg16 data.channels=1", "set data.channels=3"),
        ("model.widths=[]", "expected one or more numbers of channels"),
        ("train.precision=fp16 train.device=cpu", "CPU training does not support fp16"),
        ("train.virtual_ranks=9 data.global_batch_size=8", "is more than data.global_batch_size=8"),
    ],
)
def test_contradicting_settings_are_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides.split())
    text = str(caught.value)
    assert text.startswith(overrides.partition("=")[0]) and message in text and "\n" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: [}", "not readable as YAML"),
        ("- a\n- b", "contains no sections"),
        ("train:\n  epochs: 3\n  epochs: 4", "duplicate key epochs"),
        ("train: {epochz: 3}", "did you mean 'train.epochs'"),
        ("run: {name: '${unknown.thing}'}", "unknown"),
    ],
)
def test_invalid_file_is_refused_with_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config([file], [])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_binary_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config([file], [])


def test_config_name_without_suffix_is_a_file_in_configs() -> None:
    assert find_config_file("digits") == REPOSITORY / "configs" / "digits.yaml"
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        find_config_file("digit")
    with pytest.raises(ConfigError, match="no such file"):
        find_config_file("nowhere/mine.yaml")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_config_has_a_header_and_only_non_default_values(path: Path) -> None:
    load_config([path], [])
    assert path.read_text().startswith("# ")
    for section, settings in yaml.safe_load(path.read_text()).items():
        for key, value in settings.items():
            assert settings_by_name()[f"{section}.{key}"].default != value, f"{section}.{key} has its default value"


def test_yaml_round_trip_keeps_all_settings(tmp_path: Path) -> None:
    config = load("run.name=off", "optim.lr=1e-3", "data.augment=[flip]", "log.wandb=off")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config([file], []) == config


def test_help_lists_every_setting() -> None:
    text = help_text()
    assert all(name in text and info.help in text for name, info in settings_by_name().items())


@pytest.mark.parametrize(
    ("override", "world_size", "message"),
    [
        ("data.global_batch_size=2", 3, "raise it to 3 or more"),
        ("train.virtual_ranks=2", 3, "start 2 ranks or fewer"),
    ],
)
def test_more_ranks_than_samples_or_shards_are_refused(override: str, world_size: int, message: str) -> None:
    config = load(override)
    check_ranks(config, world_size - 1)
    with pytest.raises(WorldError, match=message):
        check_ranks(config, world_size)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5400", 5400), ("90s", 90), ("90m", 5400), ("1h30m", 5400), ("2d", 172800), ("1d2h3m4s", 93784),
        ("1:30:00", 5400), ("45:00", 2700), ("2-12:00:00", 216000), ("1-01:00", 90000),
    ],
)  # fmt: skip
def test_time_limit_formats(text: str, seconds: float) -> None:
    assert load(f"train.time_limit={text}").train.time_limit_seconds == seconds


@pytest.mark.parametrize("text", ["soon", "-5", "1:2:3:4", "0", "", "1.5h", "h"])
def test_invalid_time_limit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.time_limit=.*expected a time such as 90m"):
        load_config([], [f"train.time_limit={text}"])


def test_unquoted_time_limit_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("train: {time_limit: 1:30:00}")  # YAML 1.1 makes it the number 5400
    assert load_config([tmp_path / "x.yaml"], []).train.time_limit_seconds == 5400
