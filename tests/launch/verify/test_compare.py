"""What differs between two runs is found; what the clock says is not looked at."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processes import SMALL

from launch.verify.compare import compare, largest_loss_difference
from trainer import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:accelerate", "ignore::DeprecationWarning")


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Path, Path]:
    one, other = tmp_path / "runs" / "one", tmp_path / "runs" / "other"
    settings = [*SMALL, "run.name=one", "log.tensorboard=true", "train.max_steps=4", "log.every_steps=2"]
    assert main.main(settings) == 0
    shutil.copytree(one, other)
    return one, other


def a_bit_of_the_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(weights, folder / "model.safetensors")


def a_momentum(folder: Path) -> None:
    path = next((folder / "checkpoints").glob("step-00000004")) / "optimizer.safetensors"
    state = load_file(path)
    save_file(state | {"0.momentum_buffer": state["0.momentum_buffer"] + 1}, path)


def change_row(folder: Path, change: Callable[[dict[str, float]], object]) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    change(rows[1])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def a_loss(folder: Path) -> None:
    change_row(folder, lambda row: row.update(loss=row["loss"] * 1.01))


def a_missing_line(folder: Path) -> None:
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.partition("\n")[2])


def a_sign_of_zero(folder: Path) -> None:
    for path in (folder, folder.with_name("one")):
        weights = load_file(path / "model.safetensors")
        name = sorted(weights)[0]
        weights[name].view(-1)[0] = -0.0 if path == folder else 0.0
        save_file(weights, path / "model.safetensors")


def a_confusion(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    summary["test"]["confusion"][0][0] += 1
    (folder / "summary.json").write_text(json.dumps(summary))


def a_bad_step(folder: Path) -> None:
    (folder / "bad_steps.jsonl").write_text('{"step": 1}\n')


def a_point(folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_scalar("train/loss", 1.0, 5)
    writer.close()


def the_clock(folder: Path) -> None:
    change_row(
        folder,
        lambda row: row.update(seconds=99.0, samples_per_second=1.0, data_wait_share=0.9, communication_share=0.1),
    )


def test_twins_do_not_differ(twins: tuple[Path, Path]) -> None:
    assert not compare(*twins)
    the_clock(twins[1])
    assert not compare(*twins) and largest_loss_difference(*twins) == 0.0


@pytest.mark.parametrize(
    ("change", "what", "words"),
    [
        (a_bit_of_the_weights, "weights", "1 of 10 tensors differ"),
        (a_momentum, "optimizer", "tensors differ, by up to 1.0e+00"),
        (a_sign_of_zero, "weights", "1 of 10 tensors differ"),
        (a_confusion, "results", "test differ"),
        (a_bad_step, "metrics", "of bad_steps.jsonl: 0 and 1 lines"),
        (a_loss, "metrics", "1 of 3 lines differ, first at step 4"),
        (a_missing_line, "metrics", "3 and 2 lines"),
        (a_point, "curves", "train/loss differ"),
    ],
)
def test_a_difference_is_found_and_named(
    twins: tuple[Path, Path], change: Callable[[Path], None], what: str, words: str
) -> None:
    change(twins[1])
    found = compare(*twins)
    assert found and words in getattr(found, what)
    assert [name for name in found.__slots__ if getattr(found, name)] == [what]
    if change is a_loss:
        assert largest_loss_difference(*twins) == pytest.approx(0.01)
