"""Facts of this machine: W&B access, data sets, GPU links, disk."""

import errno
import json
from pathlib import Path

import pytest
from support.processes import free_port

from launch.doctor.node import facts
from trainer.data import cifar10_files


def data_settings(name: str, root: Path) -> dict[str, object]:
    return {"name": name, "root": str(root), "download": False}


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the URL of a W&B server that refuses connections, and sets it for W&B's client."""
    import wandb

    wandb.teardown()  # wandb reads its environment variables once a process
    server = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("WANDB_BASE_URL", server)
    return server


def test_wandb_access_reports_unreachable_server_and_never_the_key(
    wandb_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-" * 5)
    access = facts.wandb_access("auto")
    assert access["has_key"] and access["server"] == wandb_server and "a-secret" not in json.dumps(access)
    assert wandb_server in access["problem"] and "Connection refused" in access["problem"]


def test_wandb_server_comes_from_the_settings_file_of_the_client(
    wandb_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / "home" / "settings").write_text(f"[default]\nbase_url = {wandb_server}\n")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password a-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    access = facts.wandb_access("auto")
    assert access["server"] == wandb_server and access["has_key"]


def test_wandb_url_without_a_scheme_is_a_problem(wandb_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "wandb.example")
    assert facts.wandb_access("auto")["problem"].startswith("WANDB_BASE_URL='wandb.example': ")


def test_own_name_that_cannot_be_resolved_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "no.such.host.invalid")
    assert facts.own_name_problem().startswith("no.such.host.invalid: ")
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert facts.own_name_problem() == ""


def test_image_folder_without_images_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    result = facts.check_data(data_settings("image_folder", tmp_path))
    assert result["problem"] == f"{tmp_path}/train: no class folders with images"


def test_image_folder_is_summarized_without_hidden_folders(image_folder: Path) -> None:
    (image_folder / "train" / ".cache").mkdir()
    result = facts.check_data(data_settings("image_folder", image_folder))
    assert result == {"problem": "", "summary": f"2 classes in {image_folder}/train, 2 in test"}


def test_cifar10_needs_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / cifar10_files.FOLDER
    folder.mkdir()
    for name in cifar10_files.FILES[:-1]:
        (folder / name).write_bytes(b"x")
    result = facts.check_data(data_settings("cifar10", tmp_path))
    assert result == {"problem": f"{folder}/batches.meta: No such file or directory", "summary": ""}
    monkeypatch.setattr(facts, "connection_problem", lambda host, port: f"no route to {host}")
    result = facts.check_data(data_settings("cifar10", tmp_path) | {"download": True})
    assert result["server_problem"] == f"no route to {cifar10_files.SERVER}"
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


def test_missing_flock_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts.lock_problem(tmp_path / "runs") == ""

    def flock(file: object, operation: int) -> None:  # as on Lustre without the mount option flock
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(facts.fcntl, "flock", flock)
    assert facts.lock_problem(tmp_path / "runs") == "Function not implemented"
    assert not list(tmp_path.glob(".doctor-*"))
