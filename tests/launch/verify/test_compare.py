"""compare_runs finds and names each kind of difference between two runs, and ignores measured times."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processes import SMALL

from launch.verify.compare import compare_runs, largest_loss_difference
from trainer import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:accelerate", "ignore::DeprecationWarning")


@pytest.fixture
def equal_runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of the same run: runs/original and runs/copy."""
    original, copy = tmp_path / "runs" / "original", tmp_path / "runs" / "copy"
    settings = [*SMALL, "run.name=original", "log.tensorboard=true", "train.max_steps=4", "log.every_steps=2"]
    assert main.main(settings) == 0
    shutil.copytree(original, copy)
    return original, copy


def flip_weight_bit(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(weights, folder / "model.safetensors")


def reshape_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name].new_zeros(3, 7)}, folder / "model.safetensors")


def rename_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["renamed"] = weights.pop(sorted(weights)[0])
    save_file(weights, folder / "model.safetensors")


def change_momentum(folder: Path) -> None:
    path = next((folder / "checkpoints").glob("step-00000004")) / "optimizer.safetensors"
    state = load_file(path)
    save_file(state | {"0.momentum_buffer": state["0.momentum_buffer"] + 1}, path)


def change_row(folder: Path, change: Callable[[dict[str, float | None]], object]) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    change(rows[1])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_loss(folder: Path) -> None:
    change_row(folder, lambda row: row.update(loss=(row["loss"] or 0) * 1.01))


def remove_row(folder: Path) -> None:
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.partition("\n")[2])


def change_sign_of_zero(folder: Path) -> None:
    for path, zero in ((folder, -0.0), (folder.with_name("original"), 0.0)):
        weights = load_file(path / "model.safetensors")
        weights[sorted(weights)[0]].view(-1)[0] = zero
        save_file(weights, path / "model.safetensors")


def change_confusion_matrix(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    summary["test"]["confusion"][0][0] += 1
    (folder / "summary.json").write_text(json.dumps(summary))


def add_bad_step(folder: Path) -> None:
    (folder / "bad_steps.jsonl").write_text('{"step": 1}\n')


def add_tensorboard_point(folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_scalar("train/loss", 1.0, 5)
    writer.close()


def change_times(folder: Path) -> None:
    change_row(
        folder,
        lambda row: row.update(seconds=99.0, samples_per_second=1.0, data_wait_share=0.9, communication_share=0.1),
    )


def test_equal_runs_with_other_times_have_no_difference(equal_runs: tuple[Path, Path]) -> None:
    assert not compare_runs(*equal_runs)
    change_times(equal_runs[1])
    assert not compare_runs(*equal_runs) and largest_loss_difference(*equal_runs) == 0.0


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        (flip_weight_bit, "weights", "1 of 10 tensors differ"),
        (reshape_weight, "weights", "1 of 10 tensors differ, some in shape"),
        (rename_weight, "weights", "names of the tensors differ"),
        (change_momentum, "optimizer", "tensors differ, by up to 1.0e+00"),
        (change_sign_of_zero, "weights", "1 of 10 tensors differ"),
        (change_confusion_matrix, "results", "test differ"),
        (add_bad_step, "metrics", "bad_steps.jsonl: 0 and 1 rows"),
        (change_loss, "metrics", "1 of 3 rows differ, first at step 4"),
        (remove_row, "metrics", "3 and 2 rows"),
        (add_tensorboard_point, "curves", "train/loss differ"),
    ],
)
def test_changed_run_has_one_named_difference(
    equal_runs: tuple[Path, Path], change: Callable[[Path], None], field: str, message: str
) -> None:
    change(equal_runs[1])
    difference = compare_runs(*equal_runs)
    assert difference and message in getattr(difference, field)
    assert [name for name in difference.__slots__ if getattr(difference, name)] == [field]
    if change is change_loss:
        assert largest_loss_difference(*equal_runs) == pytest.approx(0.01)


def test_loss_difference_is_infinite_when_only_one_loss_is_finite(equal_runs: tuple[Path, Path]) -> None:
    change_row(equal_runs[1], lambda row: row.update(loss=None))
    assert largest_loss_difference(*equal_runs) == float("inf")
    change_row(equal_runs[0], lambda row: row.update(loss=None))
    assert largest_loss_difference(*equal_runs) == 0.0
