"""Starts real runs in shells with variables of other launchers, without a home, or with an unknown hostname."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import MAIN, REPOSITORY, SMALL, CommandResult

from launch import elastic
from launch.elastic import one_machine_options
from trainer.errors import WorldError

TRAIN = [sys.executable, str(REPOSITORY / "launch" / "main.py"), "train", *SMALL, "train.max_steps=2"]
LEFT_OVER = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "PMI_SIZE": "two", "PMI_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "0", "WORLD_SIZE": "8", "RANK": "9", "LOCAL_RANK": "x",
    "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "1", "PET_NNODES": "3", "PET_STANDALONE": "x",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_TORCH_DEVICE": "meta", "GLOO_SOCKET_IFNAME": "none0", "OMP_NUM_THREADS": "many",
}  # fmt: skip


def world_size(name: str = "digits") -> int:
    return int(json.loads(Path("runs", name, "environment.json").read_text())["world_size"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_train_ignores_variables_of_other_launchers(launch: Callable[..., CommandResult], ranks: int) -> None:
    result = launch([*TRAIN, f"--ranks={ranks}"], timeout_seconds=90, **LEFT_OVER)
    assert result.code == 0, result.err
    assert world_size() == ranks


@pytest.mark.slow
def test_random_variables_of_launchers_never_end_in_a_traceback(launch: Callable[..., CommandResult]) -> None:
    generator = random.Random(0)
    for number in range(3):
        names = generator.sample(sorted(LEFT_OVER), 5)
        command = [sys.executable, MAIN, *SMALL, "train.max_steps=1", f"run.name=random-{number}"]
        result = launch(command, timeout_seconds=90, **{name: LEFT_OVER[name] for name in names})
        assert result.code in (0, 2) and "Traceback" not in result.err, (names, result.err)
        if result.code == 2:
            assert result.err.startswith("samecurve: ") and result.err.count("\n") == 1, (names, result.err)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
def test_ranks_meet_although_the_hostname_is_unknown(launch: Callable[..., CommandResult]) -> None:
    script = 'hostname no.such.host.invalid; exec "$@"'
    result = launch(["unshare", "-u", "sh", "-c", script, "sh", *TRAIN, "--ranks=2"], timeout_seconds=90)
    assert result.code == 0, result.err
    assert world_size() == 2


def test_machine_without_loopback_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--local-addr=127.0.0.1" in one_machine_options()

    def fail(*_: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("launch.elastic.socket.socket", fail)
    with pytest.raises(WorldError, match=r"no loopback address.*ip link set lo up"):
        one_machine_options()
    monkeypatch.setattr("sys.argv", ["elastic.py", "--nproc-per-node=2", "script.py"])
    assert elastic.main() == 2  # as launch/torchrun.sh starts it
    line = capsys.readouterr().err
    assert line.startswith("samecurve: this machine has no loopback address") and line.count("\n") == 1
