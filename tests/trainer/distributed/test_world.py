"""World: collectives on three real ranks over gloo; devices and precision; refusal of incomplete groups."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from support.processes import REPOSITORY, CommandResult, free_port, torchrun

from trainer import main
from trainer.config.schema import TrainSettings
from trainer.distributed import device, world
from trainer.distributed.device import choose_kernels
from trainer.distributed.environment import available_cores
from trainer.distributed.world import World
from trainer.errors import PeerError, WorldError

WORKER = str(REPOSITORY / "tests" / "support" / "workers" / "world.py")


def set_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    """Sets the variables that torchrun sets for a rank on one machine."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    for name, value in (values | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(name, str(value))


def test_collectives_on_three_ranks(launch: Callable[..., CommandResult], tmp_path: Path) -> None:
    result = launch(torchrun(3, WORKER, str(tmp_path)))
    assert result.code == 0, result.err
    results = [json.loads((tmp_path / f"results-{rank}.json").read_text()) for rank in range(3)]
    for rank, values in enumerate(results):
        assert (values["rank"], values["size"]) == (rank, 3)
        assert values["sum"] == [6.0, 30.0]
        assert values["weight"] == 5.0 and values["max"] == [2.0, 0.0]
        assert values["error"] == "from rank 1" and values["no error"] == ""  # the lowest failing rank's, on all ranks
        assert values["from rank 0"] == "rank 0"
        assert values["equal"] == "" and values["unequal"].startswith("rank 2 differs from rank 0 in its settings")
        assert values["omp"] == "1" and values["threads"] == max(1, available_cores() // 3)
    assert results[0]["earlier marks"] == []
    assert "mark-0" in results[1]["earlier marks"] and "mark-0" in results[2]["earlier marks"]


def test_torchrun_command_uses_the_python_of_the_tests() -> None:
    assert torchrun(2)[0] == sys.executable


def test_threads_of_one_process_are_all_cores_despite_omp_num_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the effect of OMP_NUM_THREADS=1, which accelerate launch and torchrun set
    try:
        world = World(TrainSettings(device="cpu"))
        assert torch.get_num_threads() == world.threads == available_cores()
        World(TrainSettings(device="cpu", threads_per_rank=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_accelerates_precision_counts_only_with_precision_auto(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    world = World(TrainSettings(device="cpu", precision="fp32"))
    assert world.precision == "fp32" and world.accelerator.mixed_precision == "no"
    assert "--mixed_precision bf16 is ignored: train.precision=fp32" in capfd.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # World has removed it
    world = World(TrainSettings(device="cpu"))
    assert world.precision == world.accelerator.mixed_precision == "bf16" and capfd.readouterr().err == ""


def test_accelerates_overriding_variables_are_ignored_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # would divide every gradient by four
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")  # would compile despite train.compile=false
    accelerator = World(TrainSettings(device="cpu")).accelerator
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    err = capfd.readouterr().err
    assert "--gradient_accumulation_steps '4' is ignored" in err and "set train.virtual_ranks" in err
    assert "--dynamo_backend 'inductor' is ignored: set train.compile=true" in err


@pytest.mark.parametrize(("has_amx", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_on_a_cpu_is_bf16_only_with_amx(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    assert World(TrainSettings(device="cpu")).precision == precision


def test_missing_rank_is_a_world_error_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate warns if no launcher has set it
    set_rank(monkeypatch, rank=0, world_size=2)
    monkeypatch.setattr(world, "_RENDEZVOUS_TIMEOUT", timedelta(seconds=2))
    monkeypatch.setattr(world, "_GROUP_TIMEOUT", timedelta(seconds=2))
    with pytest.raises(WorldError, match=r"expected 2 processes, but not all arrived within [23] s.*other processes"):
        World(TrainSettings(device="cpu"))


def test_launcher_that_ends_before_all_ranks_have_met_is_a_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt may succeed, so this is no error of the user."""
    port = free_port()
    lines = f"import torch, time; s = torch.distributed.TCPStore('127.0.0.1', {port}, is_master=True, "
    lines += "wait_for_workers=False); print(flush=True); time.sleep(1); import os; os._exit(0)"
    with subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE) as store:
        assert store.stdout is not None
        store.stdout.readline()
        set_rank(monkeypatch, rank=0, world_size=2)
        for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_PORT", str(port))):
            monkeypatch.setenv(name, value)
        with pytest.raises(PeerError, match="the launcher of rank 0 ended before all processes had met"):
            World(TrainSettings(device="cpu"))


def test_ranks_that_cannot_form_a_group_exit_with_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 lets a launcher restart the ranks. The fake Accelerator raises the error of a broken gloo group."""

    def fail(**_: object) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(world, "Accelerator", fail)
    set_rank(monkeypatch, rank=0, world_size=2)
    assert main.main(["--config", "digits"]) == 1
    assert capfd.readouterr().err.startswith("samecurve: rank 0: the 2 processes could not form a group (Connection")
    set_rank(monkeypatch, rank=0, world_size=1)
    with pytest.raises(RuntimeError, match="Connection"):
        World(TrainSettings())


def test_kernels_are_deterministic_only_with_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        choose_kernels(exact=False, precision="bf16")
        assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
        choose_kernels(exact=True, precision="fp32")
        assert torch.is_deterministic_algorithms_warn_only_enabled() and torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


class TestWithFakeGpus:
    """torch reports two GPUs that do not exist; the tests check what World makes of them."""

    @pytest.fixture(autouse=True)
    def two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old GPU")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)

    @pytest.mark.parametrize(
        ("num_gpus", "message"), [(1, "1 GPU: .*make all GPUs visible"), (2, "2 GPUs: .*Start 2 processes")]
    )
    def test_more_ranks_than_gpus_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, num_gpus: int, message: str
    ) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        set_rank(monkeypatch, rank=0, world_size=4)
        with pytest.raises(WorldError, match=rf"4 ranks on this machine, but a rank sees {message}.*train\.device=cpu"):
            World(TrainSettings())

    def test_accelerates_use_cpu_is_obeyed_and_contradicts_device_cuda(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # use_cpu: true in its config file, or --cpu
        with pytest.raises(WorldError, match=r"train\.device=cuda, but accelerate launch is set to use the CPU"):
            World(TrainSettings(device="cuda"))
        assert World(TrainSettings()).device.type == "cpu"
        assert "has a GPU, but accelerate launch is set to use the CPU" in capfd.readouterr().err

    def test_precision_without_gpu_support_is_refused(self) -> None:
        message = r"train\.precision=bf16: Old GPU does not support it; set train.precision to fp32 or fp16"
        with pytest.raises(WorldError, match=message):
            World(TrainSettings(precision="bf16"))

    def test_device_cpu_ignores_the_gpus(self) -> None:
        assert World(TrainSettings(device="cpu")).device.type == "cpu"


def test_gpu_that_pytorch_cannot_use_is_reported_unless_the_cpu_was_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def message(train: TrainSettings) -> str:
        assert World(train).device.type == "cpu"
        return capfd.readouterr().err

    monkeypatch.setattr(device, "_DEVICE_FILES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia0").mkdir()  # a file that cannot be opened, as in a job that asked for no GPU
    assert message(TrainSettings()) == ""
    (tmp_path / "nvidia1").touch()
    assert message(TrainSettings(device="cpu")) == ""
    reported = message(TrainSettings())
    assert "this machine has a GPU, but PyTorch" in reported and "training on the CPU" in reported
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert message(TrainSettings()) == ""
