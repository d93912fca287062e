"""`samecurve evaluate` repeats the run's own scores on any world size, and scores other data of the same classes."""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.images import write_image
from support.processes import MAIN, REPOSITORY, SMALL, CommandResult, finished_run

from trainer import main as trainer_main
from trainer.config.schema import DataSettings
from trainer.data import digits
from trainer.inference.evaluate import main as evaluate_main

Evaluate = Callable[..., CommandResult]
SAMECURVE = [sys.executable, str(REPOSITORY / "launch" / "main.py")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), "train.epochs=3", "data.validation_fraction=0.1")


@pytest.fixture
def evaluate(run: Path, launch: Evaluate) -> Evaluate:
    return lambda *arguments, path=run: launch([*SAMECURVE, "evaluate", str(path), *arguments])


def parse_scores(result: CommandResult) -> dict[str, Any]:
    assert result.code == 0, result.err
    scores: dict[str, Any] = json.loads(result.out.splitlines()[-1])
    return scores


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_scores_equal_summary_on_any_number_of_ranks(run: Path, evaluate: Evaluate, ranks: int) -> None:
    scores = parse_scores(evaluate("--json", "--ranks", str(ranks), "eval.batch_size=100"))
    expected = json.loads((run / "summary.json").read_text())["test"]
    assert scores["confusion"] == expected["confusion"] and scores["classes"] == expected["classes"]
    assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert scores["weights"] == str(run / "model.safetensors")


def test_validation_split_and_checkpoint_weights_print_a_table(run: Path, evaluate: Evaluate) -> None:
    summary = json.loads((run / "summary.json").read_text())
    result = evaluate("--split", "validation", "--weights", "latest")
    assert result.code == 0, result.err
    assert (
        f"validation accuracy {summary['validation']['accuracy']:.2%} of " in result.out and "precision" in result.out
    )


def test_tta_accuracy_is_printed_with_eval_tta(evaluate: Evaluate) -> None:
    result = evaluate("eval.tta=mirror")
    assert result.code == 0 and ", with test-time augmentation " in result.out, result.err


def test_image_folder_with_classes_in_another_order_has_equal_scores(
    run: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    """The test images, as files in class folders, whose order is alphabetical."""
    source = digits.load(DataSettings(name="digits"))
    expected = json.loads((run / "summary.json").read_text())["test"]
    for split in ("train", "test"):
        for number, (pixels, label) in enumerate(zip(source.test.images, source.test.labels, strict=True)):
            folder = tmp_path / "digits" / split / source.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.squeeze(2)).save(folder / f"{number}.png")
    scores = parse_scores(evaluate("--json", "data.name=image_folder", f"data.root={tmp_path / 'digits'}"))
    assert scores["confusion"] == expected["confusion"]


def test_relative_data_root_is_found_from_another_directory(
    launch: Evaluate, image_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = ["--config", "digits", "data.name=image_folder", "data.root=images", "data.global_batch_size=4"]
    settings += ["log.wandb=off", "log.tensorboard=false", "train.max_steps=1", "run.name=x", f"run.root={tmp_path}"]
    assert launch([sys.executable, MAIN, *settings]).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert parse_scores(launch([*SAMECURVE, "evaluate", str(tmp_path / "x"), "--json"]))["num_samples"] == 6


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on an image folder, which lies beside it."""
    folder = tmp_path_factory.mktemp("folder")
    files = itertools.product(("train", "test"), ("cat", "dog"), ("0.png", "1.png", "2.png"))
    for seed, (split, name, file) in enumerate(files):
        write_image(folder / "images" / split / name / file, seed=seed)
    words = ["data.name=image_folder", f"data.root={folder / 'images'}", "data.global_batch_size=4", "train.device=cpu"]
    assert trainer_main.main([*SMALL, *words, "train.max_steps=1", "run.name=x", f"run.root={folder}"]) == 0
    return folder / "x"


@pytest.fixture
def copy(folder_run: Path, tmp_path: Path) -> Path:
    """A copy of the run and its images; the settings name the copied images."""
    shutil.copytree(folder_run.parent, tmp_path / "copy")
    config = tmp_path / "copy" / "x" / "config.yaml"
    config.write_text(config.read_text().replace(str(folder_run.parent), str(tmp_path / "copy")))
    return config.parent


class TestDataOfAnImageFolder:
    @pytest.fixture
    def evaluate_run(self, copy: Path, capfd: pytest.CaptureFixture[str]) -> Evaluate:
        """Runs trainer/inference/evaluate.py in this process, as the launcher starts it."""

        def evaluate_here(*words: str, of_run: bool = True) -> CommandResult:
            capfd.readouterr()
            data_of = ["--data-of", str(copy)] if of_run else []
            code = evaluate_main([str(copy), "--json", *data_of, "--config", str(copy / "config.yaml"), *words])
            return CommandResult(code, *capfd.readouterr())

        return evaluate_here

    def test_only_the_evaluated_split_is_needed(self, evaluate_run: Evaluate, copy: Path) -> None:
        for split, other in (("test", "train"), ("train", "test")):
            (copy.parent / "images" / other).rename(copy.parent / "hidden")
            assert parse_scores(evaluate_run("--split", split))["num_samples"] == 6
            (copy.parent / "hidden").rename(copy.parent / "images" / other)

    def test_changed_data_of_the_run_are_refused(self, evaluate_run: Evaluate, copy: Path) -> None:
        root = copy.parent / "images"
        shutil.copy(root / "test" / "cat" / "0.png", root / "test" / "dog" / "0.png")
        result = evaluate_run()
        assert "the data set is not the one that run" in result.err and "test/dog/0.png has other content" in result.err
        assert "set data.root to the data set to evaluate" in result.err and result.code == 2
        assert evaluate_run("--split", "train").code == 0
        assert evaluate_run(of_run=False).code == 0

    def test_added_test_images_are_accepted_with_the_setting(self, evaluate_run: Evaluate, copy: Path) -> None:
        write_image(copy.parent / "images" / "test" / "dog" / "9.png", seed=3)
        assert evaluate_run().code == 2
        result = evaluate_run("data.accept_added_test_images=true")
        assert parse_scores(result)["num_samples"] == 7 and "test/dog/9.png is new" in result.err

    def test_missing_classes_are_noted_and_unknown_ones_refused(self, evaluate_run: Evaluate, tmp_path: Path) -> None:
        write_image(tmp_path / "other" / "test" / "dog" / "0.png", seed=3)
        result = evaluate_run(f"data.root={tmp_path / 'other'}", of_run=False)
        assert parse_scores(result)["num_samples"] == 1
        assert "note: the test set has no images of 1 class: cat" in result.err
        write_image(tmp_path / "other" / "test" / "emu" / "0.png", seed=3)
        result = evaluate_run(f"data.root={tmp_path / 'other'}", of_run=False)
        assert result.code == 2 and "expected cat, dog; got dog, emu" in result.err

    def test_run_without_a_record_of_its_data_is_noted(self, evaluate_run: Evaluate, copy: Path) -> None:
        (copy / "data.json").unlink()
        assert "has no record of its data set, so the data are not compared" in evaluate_run().err

    def test_damaged_data_file_is_refused_in_one_line(self, evaluate_run: Evaluate, copy: Path) -> None:
        path = copy / "data.json"
        sound = json.loads(path.read_text())
        path.write_text(json.dumps(sound | {"classes": ["cat"]}))
        result = evaluate_run()
        assert f"{path} cannot be read as a file of a run (" in result.err
        assert result.code == 2 and result.err.count("\n") == 1 and "Traceback" not in result.err

    @pytest.mark.slow
    def test_command_compares_the_data_of_the_run_unless_the_user_names_others(
        self, evaluate: Evaluate, copy: Path
    ) -> None:
        root = copy.parent / "images"
        shutil.copy(root / "test" / "cat" / "0.png", root / "test" / "dog" / "0.png")
        result = evaluate("--ranks", "2", path=copy)
        assert "test/dog/0.png has other content" in result.err and result.code != 0
        assert evaluate(f"data.root={root}", path=copy).code == 0


class TestRefusals:
    def refusal(self, result: CommandResult) -> str:
        """Returns the error message, which must be one line with exit code 2."""
        assert result.code == 2 and result.err.count("\n") == 1 and "Traceback" not in result.err, result.err
        return result.err

    def test_data_set_with_other_classes(self, evaluate: Evaluate, image_folder: Path) -> None:
        error = self.refusal(evaluate("data.name=image_folder", f"data.root={image_folder}"))
        assert "expected zero, one, two" in error and "got cat, dog" in error

    def test_training_setting(self, evaluate: Evaluate) -> None:
        assert "optim.lr does not change an evaluation" in self.refusal(evaluate("optim.lr=1"))

    def test_missing_validation_split(self, evaluate: Evaluate) -> None:
        error = self.refusal(evaluate("--split", "validation", "data.validation_fraction=0"))
        assert "no validation split" in error

    def test_weights_that_do_not_exist(self, evaluate: Evaluate) -> None:
        assert "no weights '7'" in self.refusal(evaluate("--weights", "7"))

    def test_file_outside_a_run_folder_needs_a_data_set(self, evaluate: Evaluate, run: Path, tmp_path: Path) -> None:
        weights = shutil.copy(run / "model.safetensors", tmp_path / "alone.safetensors")
        assert "is not in a run folder" in self.refusal(evaluate(path=weights))
        assert evaluate("--config", "digits", path=weights).code == 0
        checkpoint = next((run / "checkpoints").iterdir())
        assert evaluate(path=checkpoint).code == 0  # with the data set of its run
