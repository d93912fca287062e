"""Tests which settings an unfinished run may change, and how the others are reported."""

from trainer.config.changes import MAY_CHANGE, changed_settings
from trainer.config.load import flatten, load_config

TRAINING_SECTIONS = {"model", "loss", "optim", "schedule"}


def test_settings_of_the_network_and_optimizer_must_not_change() -> None:
    assert not [name for name in MAY_CHANGE if name.partition(".")[0] in TRAINING_SECTIONS]
    assert not {"data.global_batch_size", "data.augment", "train.precision", "train.virtual_ranks"} & MAY_CHANGE


def test_changed_settings_are_listed_with_both_values() -> None:
    before = flatten(load_config([], []))
    config = load_config([], ["optim.lr=0.2", "run.seed=1", "train.epochs=20", "log.wandb=off"])
    assert changed_settings(before, config) == "run.seed was 0, now 1; optim.lr was 0.1, now 0.2"


def test_setting_that_an_older_run_does_not_have_is_accepted() -> None:
    before = flatten(load_config([], []))
    del before["optim.lr"]
    assert changed_settings(before, load_config([], ["optim.lr=0.2"])) == ""
