"""Checkpoints are whole or absent, and a damaged one is never believed."""

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


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    place = save(tmp_path, 12, Best(10, 0.5, "validation"))
    assert place.name == "step-00000012"
    saved = checkpoint.load(place)
    torch.manual_seed(12)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.load_state_dict(saved.model)
    optimizer.load_state_dict(saved.optimizer)
    assert optimizer.state[net.weight]["momentum_buffer"].tolist() == [[1.0] * 3] * 2
    assert saved.progress == Progress(12, 1.5, [2.0, 3.0, 7.0], Best(10, 0.5, "validation"))


def test_the_newest_is_the_highest_step_not_the_latest_written(tmp_path: Path) -> None:
    for step in (5, 100_000_000, 20):
        save(tmp_path, step)
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "step-100000000", [])
    assert checkpoint.newest_valid(tmp_path / "nowhere") == (None, [])


def flipped(content: bytes, place: int) -> bytes:
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "missing": None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte longer": lambda content: content + b"\0",
    "first byte": lambda content: flipped(content, 0),
    "ninth byte": lambda content: flipped(content, 8),  # the first after the length of safetensors' header
    "middle byte": lambda content: flipped(content, len(content) // 2),
    "last byte": lambda content: flipped(content, -1),
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_named_and_passed_over(tmp_path: Path, name: str, kind: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    path, change = bad / name, DAMAGE[kind]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    place, damaged = checkpoint.newest_valid(tmp_path)
    assert place == good and bad.exists()
    (line,) = damaged
    assert "step-00000002" in line and name in line
    with pytest.raises(FolderError, match="step-00000002"):
        checkpoint.load(bad)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    place = save(tmp_path, 2)
    content = (place / "manifest.json").read_bytes()
    spaces = {index for index, byte in enumerate(content) if byte in b" \n"}
    for index in set(range(len(content))) - spaces:
        (place / "manifest.json").write_bytes(flipped(content, index))
        assert checkpoint.find_damage(place), index
    (place / "manifest.json").write_bytes(content)
    assert not checkpoint.find_damage(place)


def test_folders_that_are_half_there(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / ".step-00000002.partial")  # killed before the rename
    (tmp_path / "step-00000003").mkdir()
    save(tmp_path, 4).rename(tmp_path / "step-00000005")  # by somebody's hand: it is not what it says
    (tmp_path / "step-00000006").write_text("a file")
    save(tmp_path, 7).rename(tmp_path / ".step-00000007.replaced")
    place, damaged = checkpoint.newest_valid(tmp_path)
    assert place == good and len(damaged) == 3
    assert all(f"step-0000000{step}" in line for step, line in zip((6, 5, 3), damaged, strict=True))


def test_a_save_that_was_killed_leaves_nothing_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_flush", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "step-00000001", [])


def test_a_damaged_one_gives_way_to_the_same_step_saved_again(tmp_path: Path) -> None:
    place = save(tmp_path, 3)
    (place / "model.safetensors").write_bytes(b"")
    save(tmp_path, 3)
    assert checkpoint.newest_valid(tmp_path) == (place, [])
    assert [path.name for path in tmp_path.iterdir() if "step" in path.name] == ["step-00000003"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    places = [save(tmp_path, step) for step in range(1, 7)]
    checkpoint.prune(tmp_path, 2, places[-1], {3}, {})
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step-00000006",
        "step-00000005",
        "step-00000003",
    ]


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> object:
            return Path.touch, (tmp_path / "sprung",)

    good, place = save(tmp_path, 1), save(tmp_path, 2)
    (place / "optimizer.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FolderError, match=r"optimizer\.pt was not written by a save"):
        checkpoint.load(place)
    assert checkpoint.newest_valid(tmp_path)[0] == good and not (tmp_path / "sprung").exists()


def test_nothing_that_loads_is_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save(tmp_path, 1)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was loaded")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert checkpoint.load(place).progress.step == 1
