"""`samecurve evaluate`: the run's own scores again, on any number of ranks; other data of the same classes."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.processes import MAIN, REPOSITORY, Done, finished_run

from trainer.config.schema import DataSettings
from trainer.data import digits

SAMECURVE = [sys.executable, str(REPOSITORY / "launch" / "main.py")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), "train.epochs=3", "data.validation_fraction=0.1")


@pytest.fixture
def evaluate(run: Path, launch: Callable[..., Done]) -> Callable[..., Done]:
    return lambda *words, given=run: launch([*SAMECURVE, "evaluate", str(given), *words])


def scores(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_runs_own_scores_again_on_any_number_of_ranks(run: Path, evaluate: Callable[..., Done], ranks: int) -> None:
    found = scores(evaluate("--json", "--ranks", str(ranks), "eval.batch_size=100"))
    wanted = json.loads((run / "summary.json").read_text())["test"]
    assert found["confusion"] == wanted["confusion"] and found["classes"] == wanted["classes"]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert found["weights"] == str(run / "model.safetensors")


def test_what_was_held_out_and_an_earlier_step_for_people(run: Path, evaluate: Callable[..., Done]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    done = evaluate("--split", "validation", "--weights", "latest")
    assert done.code == 0, done.err
    assert f"validation accuracy {summary['validation']['accuracy']:.2%} of " in done.out and "precision" in done.out


def test_a_folder_of_the_same_classes_in_another_order(
    run: Path, evaluate: Callable[..., Done], tmp_path: Path
) -> None:
    """The test images, as files of another size, whose folders are in the alphabet's order."""
    source = digits.load(DataSettings(name="digits"))
    wanted = json.loads((run / "summary.json").read_text())["test"]
    for split, part in (("train", source.test), ("test", source.test)):
        for place, (pixels, label) in enumerate(zip(part.images, part.labels, strict=True)):
            folder = tmp_path / "digits" / split / source.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.squeeze(2)).save(folder / f"{place}.png")
    found = scores(evaluate("--json", "data.name=image_folder", f"data.root={tmp_path / 'digits'}"))
    assert found["confusion"] == wanted["confusion"]


def test_a_runs_data_are_found_from_anywhere(
    launch: Callable[..., Done], image_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = ["--config", "digits", "data.name=image_folder", "data.root=images", "data.global_batch_size=4"]
    settings += ["log.wandb=off", "log.tensorboard=false", "train.max_steps=1", "run.name=x", f"run.root={tmp_path}"]
    assert launch([sys.executable, MAIN, *settings]).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert scores(launch([*SAMECURVE, "evaluate", str(tmp_path / "x"), "--json"]))["num_samples"] == 6


class TestRefusals:
    def refused(self, done: Done) -> str:
        assert done.code == 2 and done.err.count("\n") == 1 and "Traceback" not in done.err, done.err
        return done.err

    def test_other_classes(self, evaluate: Callable[..., Done], image_folder: Path) -> None:
        error = self.refused(evaluate("data.name=image_folder", f"data.root={image_folder}"))
        assert "got cat, dog; wanted zero, one, two" in error

    def test_settings_of_training(self, evaluate: Callable[..., Done]) -> None:
        assert "optim.lr does not change an evaluation" in self.refused(evaluate("optim.lr=1"))

    def test_nothing_held_out_and_no_such_weights(self, evaluate: Callable[..., Done], run: Path) -> None:
        assert "nothing is held out" in self.refused(evaluate("--split", "validation", "data.validation_fraction=0"))
        assert "no weights '7'" in self.refused(evaluate("--weights", "7"))

    def test_a_file_of_weights_wants_a_data_set(self, evaluate: Callable[..., Done], run: Path, tmp_path: Path) -> None:
        weights = run / "model.safetensors"
        alone = shutil.copy(weights, tmp_path / "alone.safetensors")
        assert "is in no run's folder" in self.refused(evaluate(given=alone))
        assert evaluate("--config", "digits", given=alone).code == 0
        checkpoint = next((run / "checkpoints").iterdir())
        assert evaluate(given=checkpoint).code == 0  # by the settings of its run
