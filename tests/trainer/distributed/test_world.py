"""The world: three real ranks over gloo agree, add, wait for each other; strangers are refused."""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support.processes import REPOSITORY, Done, free_port, torchrun

from trainer import main
from trainer.config.schema import TrainSettings
from trainer.distributed import device, world
from trainer.distributed.device import choose_kernels
from trainer.distributed.environment import available_cores, read_environment
from trainer.distributed.world import World
from trainer.errors import WorldError

WORKER = str(REPOSITORY / "tests" / "support" / "workers" / "world.py")


def test_three_ranks_work_together(launch: Callable[..., Done], tmp_path: Path) -> None:
    done = launch(torchrun(3, WORKER, str(tmp_path)))
    assert done.code == 0, done.err
    ranks = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(3)]
    for rank, seen in enumerate(ranks):
        assert (seen["rank"], seen["size"]) == (rank, 3)
        assert seen["sum"] == [6.0, 30.0]
        assert seen["weight"] == 5.0 and seen["largest"] == [2.0, 0.0]
        assert seen["together"] == "from rank 1" and seen["no error"] == ""  # the lowest failing rank's, on all
        assert seen["from first"] == "rank 0"
        assert seen["omp"] == "1" and seen["threads"] == max(1, available_cores() // 3)
    assert ranks[0]["first"] == [] and "mark-0" in ranks[1]["first"] and "mark-0" in ranks[2]["first"]


def test_one_process_uses_all_cores_whatever_a_launcher_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does, which accelerate launch and torchrun set
    try:
        world = World(TrainSettings(device="cpu"))
        assert torch.get_num_threads() == world.threads == available_cores()
        World(TrainSettings(device="cpu", threads_per_rank=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_launchers_precision_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # accelerate's file of defaults in the home folder is read silently and arrives here as a variable.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    world = World(TrainSettings(device="cpu", precision="fp32"))
    assert world.precision == "fp32" and world.accelerator.mixed_precision == "no"


@pytest.mark.parametrize(("has_amx", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_trains_in_bf16_where_it_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    assert World(TrainSettings(device="cpu")).precision == precision


def test_variables_that_accelerate_lets_overrule_its_caller_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # would divide every gradient by four
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")  # would compile, whatever train.compile says
    accelerator = World(TrainSettings(device="cpu")).accelerator
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_that_started_more_processes_is_believed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "4")
    assert read_environment().announced_world_size == 4


def test_a_sibling_that_never_comes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate warns where no launcher has set it
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr("trainer.distributed.world._MEET_TIMEOUT", timedelta(seconds=2))
    with pytest.raises(WorldError, match=r"not all 2 processes met within 2 s.*other machines"):
        World(TrainSettings(device="cpu"))


def test_strangers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")  # srun -n 4 python trainer/main.py
    with pytest.raises(WorldError, match="the launcher started 4 processes but this one sees a group of 1"):
        World(TrainSettings(device="cpu"))


@pytest.mark.parametrize("compiles", [True, False])
def test_a_gpus_kernels_repeat_where_the_same_bits_are_wanted(monkeypatch: pytest.MonkeyPatch, compiles: bool) -> None:
    for place, name in (
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        choose_kernels(exact=False, precision="bf16", compiles=compiles)
        assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
        choose_kernels(exact=True, precision="fp32", compiles=compiles)
        assert torch.is_deterministic_algorithms_warn_only_enabled() and torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


class TestDevices:
    """A GPU cannot be had here: what torch says of one is set, what we make of it is tested."""

    @pytest.fixture(autouse=True)
    def two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old GPU")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)

    @pytest.mark.parametrize(("seen", "way"), [(1, "one GPU: .*have each see all GPUs"), (2, "2 GPUs: .*2 processes")])
    def test_more_ranks_than_gpus_are_refused(self, monkeypatch: pytest.MonkeyPatch, seen: int, way: str) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        with pytest.raises(WorldError, match=rf"4 ranks on this machine, which see {way}.*train\.device=cpu"):
            World(TrainSettings())

    def test_what_accelerate_was_told_of_the_device_counts(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # use_cpu: true in its file, or --cpu
        with pytest.raises(WorldError, match=r"train\.device=cuda, but accelerate launch was told to use the CPU"):
            World(TrainSettings(device="cuda"))
        assert World(TrainSettings()).device.type == "cpu"
        assert "there is a GPU, but accelerate launch was told to use the CPU" in capfd.readouterr().err

    def test_a_precision_that_the_gpu_lacks_is_refused(self) -> None:
        with pytest.raises(WorldError, match=r"train\.precision=bf16: Old GPU lacks it; choose auto, fp32 or fp16"):
            World(TrainSettings(precision="bf16"))

    def test_the_cpu_can_be_had_all_the_same(self) -> None:
        assert World(TrainSettings(device="cpu")).device.type == "cpu"


def test_a_gpu_that_pytorch_cannot_use_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def told(train: TrainSettings) -> str:
        assert World(train).device.type == "cpu"
        return capfd.readouterr().err

    monkeypatch.setattr(device, "_GPU_FILES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia0").mkdir()  # a file that cannot be opened, as in a job that asked for no GPU
    assert told(TrainSettings()) == ""
    (tmp_path / "nvidia1").touch()
    assert told(TrainSettings(device="cpu")) == ""
    assert "there is a GPU, but PyTorch" in told(TrainSettings()) and "training on the CPU" in told(TrainSettings())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert told(TrainSettings()) == ""


def test_processes_that_form_no_group_may_be_started_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """gloo cannot be made to fail at will: in its place is an Accelerator that raises what gloo does."""

    def fails(**_: object) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(world, "Accelerator", fails)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(["--config", "digits"]) == 1
    assert capfd.readouterr().err.startswith("samecurve: rank 0: the 2 processes could not form a group (Connection")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="Connection"):
        World(TrainSettings())


def test_the_worker_is_run_by_this_python() -> None:
    assert torchrun(2)[0] == sys.executable
