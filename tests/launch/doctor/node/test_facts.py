"""Facts of this machine: W&B access, data sets, GPU links, disk."""

import json
from pathlib import Path

import pytest
from support.processes import free_port

from launch.doctor.node import facts


def data_settings(name: str, root: Path) -> dict[str, object]:
    return {"name": name, "root": str(root), "download": False}


def test_wandb_access_reports_unreachable_server_and_never_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    access = facts.wandb_access(f"http://127.0.0.1:{free_port()}")
    assert access["has_key"] and access["problem"] == "Connection refused" and "a-secret" not in json.dumps(access)


def test_wandb_key_in_netrc_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password a-secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    access = facts.wandb_access("https://api.wandb.ai")
    assert access["has_key"] and access["host"] == "127.0.0.1"
    assert not facts.wandb_access("https://other.example")["has_key"]


def test_image_folder_without_images_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    result = facts.check_data(data_settings("image_folder", tmp_path))
    assert result["problem"] == f"{tmp_path}/train: no class folders with images"


def test_image_folder_is_summarized_without_hidden_folders(image_folder: Path) -> None:
    (image_folder / "train" / ".cache").mkdir()
    result = facts.check_data(data_settings("image_folder", image_folder))
    assert result == {"problem": "", "summary": f"2 classes in {image_folder}/train, 2 in test"}


def test_cifar10_needs_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / facts.CIFAR10_FOLDER
    folder.mkdir()
    for name in facts.CIFAR10_FILES[:-1]:
        (folder / name).write_bytes(b"x")
    result = facts.check_data(data_settings("cifar10", tmp_path))
    assert result == {"problem": f"{folder}/batches.meta: No such file or directory", "summary": ""}
    monkeypatch.setattr(facts, "connection_problem", lambda host, port: f"no route to {host}")
    result = facts.check_data(data_settings("cifar10", tmp_path) | {"download": True})
    assert result["server_problem"] == f"no route to {facts.CIFAR10_SERVER}"
    (folder / "batches.meta").write_bytes(b"x")
    assert facts.check_data(data_settings("cifar10", tmp_path))["problem"] == ""


@pytest.mark.parametrize("name", ["photos.py:load", "my_package.photos:load"])
def test_data_set_of_the_user_is_not_checked(tmp_path: Path, name: str) -> None:
    result = facts.check_data(data_settings(name, tmp_path / "missing"))
    assert result == {"problem": "", "summary": f"not checked: the doctor does not know the files of {name}"}


def test_write_problem_names_the_nearest_folder(tmp_path: Path) -> None:
    assert facts.write_problem(tmp_path / "runs" / "new") == ""
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]  # nothing remains
    assert facts.nearest_folder(tmp_path / "runs" / "new") == tmp_path
    assert facts.write_problem(Path("/proc/self/fd/x")).startswith("/proc/self/fd: ")


def test_exact_requirement_reads_the_pinned_version(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["numpy", "torch==2.15.0; python_version >= '3.11'", "torchaudio==1.0"]
    monkeypatch.setattr("importlib.metadata.requires", lambda package: requirements)
    assert facts.exact_requirement("torchvision", "torch") == "2.15.0"
    assert facts.exact_requirement("torchvision", "numpy") == ""


def test_topology_table_is_parsed() -> None:
    text = (
        "\tGPU0\tGPU1\tNIC0\tCPU Affinity\nGPU0\t X \tNV18\tPXB\t0-47\nGPU1\tNV18\t X \tPXB\t0-47\nNIC0\tPXB\tPXB\t X\n"
    )
    assert facts.parse_topology(text) == [["X", "NV18"], ["NV18", "X"]]
