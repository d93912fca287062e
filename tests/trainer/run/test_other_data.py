"""A run that continues with other data is refused before the first step, on every rank; moved data are accepted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.images import write_image
from support.processes import SMALL, Ranks

from launch.forecast import RankLayout, load_settings
from launch.preflight import check_run
from trainer.build import _check_data
from trainer.config.load import load_config
from trainer.data.identity import DataIdentity, SplitIdentity
from trainer.errors import DataError
from trainer.run import checkpoint
from trainer.run.checkpoint import Progress, TrainingState

STEPS = ["data.global_batch_size=4", "checkpoint.every_steps=2", "train.epochs=3"]


def train(root: Path, *words: str) -> list[str]:
    settings = ["data.name=image_folder", f"data.root={root}", "run.name=r", *STEPS]
    return [*SMALL, *settings, *words]


def begun_run(ranks: Ranks, root: Path, size: int = 1) -> Path:
    """Trains two of nine steps. Returns the run folder."""
    ranks.run(size, *train(root, "train.max_steps=2"))
    return ranks.log.parent / "runs" / "r"


def newest(run: Path) -> Path:
    path, _ = checkpoint.find_newest_valid(run / "checkpoints")
    assert path is not None
    return path


def rename_class(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "zebra")


def add_class(root: Path) -> None:
    for split in ("train", "test"):
        write_image(root / split / "emu" / "0.png", seed=5)


def assert_refused(output: str, words: str) -> None:
    """Checks that the output has one error, in one line. Without a launcher each rank prints it."""
    (error,) = {line for line in output.splitlines() if line.startswith("samecurve: ")}
    assert "the data set is not the one" in error and words in error and "choose another run.name" in error
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("change", "words"), [(rename_class, "class cat is now zebra"), (add_class, "class emu is new")]
)
def test_changed_classes_are_refused_before_the_first_step(
    ranks: Ranks, image_folder: Path, change: Callable[[Path], None], words: str
) -> None:
    run = begun_run(ranks, image_folder)
    metrics = (run / "metrics.jsonl").read_text()
    change(image_folder)
    assert_refused(ranks.run(1, *train(image_folder), code=2), words)
    assert (run / "metrics.jsonl").read_text() == metrics
    for settings in ([], ["run.name=other", f"run.resume={run}"], ["run.name=other", f"run.resume={newest(run)}"]):
        config = load_settings(["digits"], train(image_folder, f"run.root={run.parent}", *settings)[2:])
        with pytest.raises(DataError, match=words):  # before a job is queued
            check_run(config, RankLayout(1, 1, "cpu"))


@pytest.mark.slow
def test_changed_data_are_refused_on_all_ranks(ranks: Ranks, image_folder: Path) -> None:
    begun_run(ranks, image_folder, 2)
    rename_class(image_folder)
    assert_refused(ranks.run(2, *train(image_folder), code=2), "class cat is now zebra")


def test_moved_data_are_accepted(ranks: Ranks, image_folder: Path) -> None:
    run = begun_run(ranks, image_folder)
    moved = shutil.copytree(image_folder, image_folder.with_name("moved"), copy_function=shutil.copyfile)
    shutil.rmtree(image_folder)
    ranks.run(1, *train(moved))
    assert json.loads((run / "summary.json").read_text())["steps"] == 9
    assert sorted(path.name.split("-")[0] for path in (run / "data").iterdir()) == ["test", "train"]
    content = json.loads((run / "data.json").read_text())
    assert content["classes"] == ["cat", "dog"] and content["splits"]["train"]["counts"] == [6, 6]


def test_added_test_images_are_accepted_with_the_setting(ranks: Ranks, image_folder: Path) -> None:
    run = begun_run(ranks, image_folder)
    write_image(image_folder / "test" / "cat" / "9.png", seed=5)
    assert "set data.accept_added_test_images=true" in ranks.run(1, *train(image_folder), code=2)
    output = ranks.run(1, *train(image_folder, "data.accept_added_test_images=true"))
    assert "data.accept_added_test_images=true: test has 7 images instead of 6" in output
    assert json.loads((run / "summary.json").read_text())["test"]["num_samples"] == 7
    assert "is finished" in ranks.run(1, *train(image_folder))  # the checkpoints know the added image


def test_checkpoint_of_another_run_is_compared(ranks: Ranks, image_folder: Path) -> None:
    path = next((begun_run(ranks, image_folder) / "checkpoints").iterdir())
    (image_folder / "train" / "cat" / "3.png").unlink()
    words = train(image_folder, "run.name=other", f"run.resume={path}")
    output = ranks.run(1, *words, code=2)
    assert "train has 11 images instead of 12 (cat 5 instead of 6); train/cat/3.png is missing" in output
    alone = shutil.copytree(path, image_folder.with_name("alone") / path.name)
    output = ranks.run(1, *train(image_folder, "run.name=other", f"run.resume={alone}"), code=2)
    assert "train has 11 images instead of 12 (cat 5 instead of 6)" in output


def test_checkpoint_without_identity_continues_with_a_note(ranks: Ranks, image_folder: Path) -> None:
    run = begun_run(ranks, image_folder)
    for path in (run / "checkpoints").iterdir():
        state = checkpoint.load(path)
        shutil.rmtree(path)
        state.progress.data = {}
        checkpoint.save(run / "checkpoints", state)
    (image_folder / "train" / "cat" / "3.png").unlink()
    output = ranks.run(1, *train(image_folder))
    assert output.count("has no record of its data set, so the data are not compared") == 1


def test_checkpoint_at_the_root_of_the_file_system_is_compared() -> None:
    split = SplitIdentity((1,), "0" * 64)
    identity = DataIdentity(("cat",), {"train": split, "test": split})
    saved = TrainingState({}, {}, {}, Progress(data=identity.to_json()), path=Path("/step-00000001"))
    assert _check_data(saved, identity, load_config([], ["run.name=x"])) == ""


@pytest.mark.slow
def test_ranks_with_different_data_are_refused(ranks: Ranks) -> None:
    output = ranks.run(2, *SMALL, fault="other_data", code=2)
    assert "rank 1 differs from rank 0 in its data set (data.root=data). Give all machines the same files" in output
