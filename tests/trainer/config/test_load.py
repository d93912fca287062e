"""Settings: what is right comes out typed, what is wrong is one line that says what to do."""

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


def test_the_later_layer_wins(tmp_path: Path) -> None:
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


def test_an_image_size_of_auto_is_a_number_at_once_unless_weights_have_their_own() -> None:
    assert load("data.image_size=auto") == load()
    assert load("data.image_size=auto", "model.name=vgg16", "model.pretrained=hub").data.image_size == "auto"


def test_what_yaml_would_misread_is_read_as_meant(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("log: {wandb: off}\noptim: {lr: 1e-3}\nrun: {name: 'no'}")
    from_file = load_config([file], [])
    typed = load("log.wandb=off", "optim.lr=1e-3", "run.name=no")
    for config in (from_file, typed):
        assert (config.log.wandb, config.optim.lr, config.run.name) == ("off", 0.001, "no")


@pytest.mark.parametrize("text", ["a b", "${oc.env:HOME}", "x;rm -rf y", "ünï", "1e5", "[a", "a=b", "#c", "null"])
def test_text_arrives_as_it_was_typed(text: str) -> None:
    assert load(f"run.name={text}").run.name == text


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.epoch=3", "did you mean 'train.epochs'"),
        ("optim.epochs=3", "did you mean 'train.epochs'"),
        ("optm.lr=3", "did you mean 'optim'"),
        ("lr=3", "did you mean 'optim.lr'"),
        ("train.precision=fp64", "choose from auto, bf16, fp16, fp32"),
        ("data.name=cifar", "did you mean 'cifar10'?"),
        ("train.epochs=many", "train.epochs=many: wanted a whole number"),
        ("train.epochs=1.5", "wanted a whole number"),
        ("optim.lr=fast", "wanted a number"),
        ("data.shuffle=perhaps", "wanted true or false"),
        ("train.epochs=null", "wanted a whole number"),
        ("data.augment=flip", "wanted a list such as [flip, crop]"),
        ("data.augment=[flipp]", "did you mean 'flip'"),
        ("train=3", "'train' holds settings"),
        ("train.epochs", "is not a setting: write section.key=value"),
        ("--epochs=3", "is not a setting: write section.key=value"),
        ("data.augment=[flip", "not readable as YAML"),
        ("train.epochs=0", "train.epochs=0: wanted 1 or more"),
        ("optim.lr=0", "wanted more than 0"),
        ("optim.lr=nan", "wanted more than 0"),
        ("optim.lr=.inf", "wanted a finite number"),
        ("data.validation_fraction=0.9", "wanted 0.5 or less"),
        ("train.threads_per_rank=0", "wanted 1 or more, or auto"),
        ("train.threads_per_rank=two", "wanted 1 or more, or auto"),
        ("data.channels=2", "choose from 1, 3, auto"),
        ("data.image_size=big", "data.image_size=big: wanted 1 or more, or auto"),
        ("data.image_size=0", "wanted 1 or more"),
        ("data.normalize=weights", "there are no weights without model.pretrained"),
        ("model.freeze=features", "wanted a list such as [features, classifier.0]"),
        ("optim.lr_parts=[fc]", "wanted NAME=RATE"),
        ("optim.lr_parts=[=0.1]", "wanted NAME=RATE"),
        ("optim.lr_parts=[fc=fast]", "wanted NAME=RATE"),
        ("optim.lr_parts=[fc=0]", "with a rate above 0"),
        ("optim.lr_parts=[fc=.inf]", "wanted NAME=RATE"),
        ("optim.lr_parts=[fc=0.1,fc=0.2]", "has a name twice"),
        ("model.name=resnet81", "did you mean 'resnet18'"),
        ("run.name=../elsewhere", "wanted the name of a folder under run.root"),
        ("run.name=.", "wanted the name of a folder under run.root"),
        ("run.seed=5000000000", "wanted 4294967295 or less"),
        ("run.name=/elsewhere", "wanted the name of a folder under run.root"),
        ("schedule.warmup_epochs=99", "more than train.epochs=10; shorten it, say to schedule.warmup_epochs=1"),
        ("train.epochs=4 schedule.warmup_epochs=5", "say to schedule.warmup_epochs=0.4"),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_what_to_do(override: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*override.split())
    text = str(caught.value)
    assert wanted in text and "\n" not in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.name=mse", "loss.label_smoothing=0.1"],
        ["optim.nesterov=true", "optim.momentum=0"],
        ["optim.nesterov=true", "optim.name=adamw"],
        ["optim.betas=[0.9]"],
        ["optim.lr_parts=[fc=0.1]", "optim.lr_head=0.1"],
        ["optim.lr_parts=[fc=0.1]", "optim.lr_vectors=0.1", "optim.name=muon"],
        ["data.image_size=auto", "data.progressive_sizes=[33]"],
        ["model.name=lenet", "model.pretrained=hub"],
        ["data.augment=[cutout]", "data.cutout_size=33"],
        ["train.device=cpu", "train.precision=fp16"],
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=overrides[0].partition("=")[0].split(".")[0]):
        load(*overrides)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train: {epochs: [}", "not readable as YAML"),
        ("- a\n- b", "holds a list"),
        ("train:\n  epochs: 3\n  epochs: 4", "duplicate key epochs"),
        ("train: {epochz: 3}", "did you mean 'train.epochs'"),
        ("run: {name: '${unknown.thing}'}", "unknown"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, wanted: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config([file], [])
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config([file], [])


def test_a_bare_name_is_a_file_of_configs() -> None:
    assert find_config_file("digits") == REPOSITORY / "configs" / "digits.yaml"
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        find_config_file("digit")
    with pytest.raises(ConfigError, match="no such file"):
        find_config_file("nowhere/mine.yaml")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_holds_only_its_differences_and_says_what_it_is(path: Path) -> None:
    load_config([path], [])
    assert path.read_text().startswith("# ")
    for section, settings in yaml.safe_load(path.read_text()).items():
        for key, value in settings.items():
            assert settings_by_name()[f"{section}.{key}"].default != value, f"{section}.{key} is the default already"


def test_the_resolved_settings_are_read_back_the_same(tmp_path: Path) -> None:
    config = load("run.name=off", "optim.lr=1e-3", "data.augment=[flip]", "log.wandb=off")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config([file], []) == config


def test_help_lists_every_setting() -> None:
    text = help_text()
    assert all(name in text and info.field.metadata["help"] in text for name, info in settings_by_name().items())


@pytest.mark.parametrize(
    ("words", "ranks", "told"),
    [
        (["data.global_batch_size=2"], 3, "raise it to 3 or more"),
        (["train.virtual_ranks=2"], 3, "start 2 processes at most"),
    ],
)
def test_ranks_that_cannot_share_a_batch_are_refused(words: list[str], ranks: int, told: str) -> None:
    config = load_config([], words)
    check_ranks(config, ranks - 1)
    with pytest.raises(WorldError, match=told):
        check_ranks(config, ranks)
