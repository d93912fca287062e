"""Checkpoints are complete or absent, and a damaged checkpoint is never loaded."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.errors import FolderError
from trainer.run import checkpoint
from trainer.run.checkpoint import Best, Progress, TrainingState


def save(folder: Path, step: int, best: Best | None = None) -> Path:
    torch.manual_seed(step)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    progress = Progress(step, 1.5, [2.0, 3.0, 7.0], best)
    return checkpoint.save(folder, TrainingState(net.state_dict(), optimizer.state_dict(), {"scale": 2.0}, progress))


def test_load_returns_the_saved_state(tmp_path: Path) -> None:
    path = save(tmp_path, 12, Best(10, 0.5, "validation"))
    assert path.name == "step-00000012"
    state = checkpoint.load(path)
    torch.manual_seed(12)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.load_state_dict(state.model)
    optimizer.load_state_dict(state.optimizer)
    assert optimizer.state[net.weight]["momentum_buffer"].tolist() == [[1.0] * 3] * 2
    assert state.progress == Progress(12, 1.5, [2.0, 3.0, 7.0], Best(10, 0.5, "validation"))


def test_newest_checkpoint_has_the_highest_step(tmp_path: Path) -> None:
    for step in (5, 100_000_000, 20):
        save(tmp_path, step)
    assert checkpoint.find_newest_valid(tmp_path) == (tmp_path / "step-100000000", [])
    assert checkpoint.find_newest_valid(tmp_path / "nowhere") == (None, [])


def flip_bit(content: bytes, index: int) -> bytes:
    index %= len(content)
    return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]


DAMAGE = {
    "missing": None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte longer": lambda content: content + b"\0",
    "first byte": lambda content: flip_bit(content, 0),
    "ninth byte": lambda content: flip_bit(content, 8),  # the first after the length of safetensors' header
    "middle byte": lambda content: flip_bit(content, len(content) // 2),
    "last byte": lambda content: flip_bit(content, -1),
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_skipped_with_a_message(tmp_path: Path, name: str, kind: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    file, change = bad / name, DAMAGE[kind]
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    path, messages = checkpoint.find_newest_valid(tmp_path)
    assert path == good and bad.exists()
    (line,) = messages
    assert "step-00000002" in line and name in line
    with pytest.raises(FolderError, match="step-00000002"):
        checkpoint.load(bad)


def test_any_flipped_bit_in_the_manifest_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    content = (path / "manifest.json").read_bytes()
    spaces = {index for index, byte in enumerate(content) if byte in b" \n"}
    for index in set(range(len(content))) - spaces:
        (path / "manifest.json").write_bytes(flip_bit(content, index))
        assert checkpoint.find_damage(path), index
    (path / "manifest.json").write_bytes(content)
    assert not checkpoint.find_damage(path)


def test_incomplete_and_renamed_checkpoints_are_skipped(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / ".step-00000002.partial")  # killed before the rename
    (tmp_path / "step-00000003").mkdir()
    save(tmp_path, 4).rename(tmp_path / "step-00000005")  # renamed by a user: its step is wrong
    (tmp_path / "step-00000006").write_text("a file")
    save(tmp_path, 7).rename(tmp_path / ".step-00000007.replaced")
    path, messages = checkpoint.find_newest_valid(tmp_path)
    assert path == good and len(messages) == 3
    assert all(f"step-0000000{step}" in line for step, line in zip((6, 5, 3), messages, strict=True))


def test_killed_save_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_flush", kill)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert checkpoint.find_newest_valid(tmp_path) == (tmp_path / "step-00000001", [])


def test_save_replaces_a_damaged_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (path / "model.safetensors").write_bytes(b"")
    save(tmp_path, 3)
    assert checkpoint.find_newest_valid(tmp_path) == (path, [])
    assert [path.name for path in tmp_path.iterdir() if "step" in path.name] == ["step-00000003"]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in range(1, 7)]
    checkpoint.prune(tmp_path, 2, paths[-1], {3}, {})
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step-00000006",
        "step-00000005",
        "step-00000003",
    ]


def test_prune_ignores_checkpoints_of_later_steps(tmp_path: Path) -> None:
    """A later checkpoint that was damaged and has been repaired must not push out the checkpoints of this session."""
    paths = [save(tmp_path, step) for step in (1, 2, 3, 8, 9)]
    checkpoint.prune(tmp_path, 2, paths[2], set(), {})
    assert [int(path.name[-8:]) for path in checkpoint.list_checkpoints(tmp_path)] == [9, 8, 3, 2]


def test_checkpoint_with_a_pickle_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> object:
            return Path.touch, (tmp_path / "sprung",)

    good, path = save(tmp_path, 1), save(tmp_path, 2)
    (path / "optimizer.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FolderError, match=r"optimizer\.pt does not belong to a checkpoint"):
        checkpoint.load(path)
    assert checkpoint.find_newest_valid(tmp_path)[0] == good and not (tmp_path / "sprung").exists()


def test_load_uses_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was loaded")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert checkpoint.load(path).progress.step == 1
