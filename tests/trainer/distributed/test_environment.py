"""Tests which launcher a process sees, with complete, inconsistent and left-over variables."""

import os
import random
from unittest import mock

import pytest
from accelerate.state import AcceleratorState

from trainer import main
from trainer.config.schema import TrainSettings
from trainer.distributed.environment import read_environment, without_launchers
from trainer.distributed.world import World
from trainer.errors import WorldError

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip
# Variables that torchrun, Accelerate, MPI's launchers and schedulers set.
VARIABLES = (
    *TORCHRUN, "GROUP_RANK", "NODE_RANK", "ROLE_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE", "PET_NNODES",
    "PET_NPROC_PER_NODE", "PET_STANDALONE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS",
    "SLURM_JOB_ID", "SLURM_NODEID", "SLURM_CPUS_ON_NODE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "LSB_JOBID",
    "PBS_JOBID", "JSM_NAMESPACE_SIZE", "FORK_LAUNCHED", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "FSDP_VERSION",
    "MEGATRON_LM_TP_DEGREE", "OMP_NUM_THREADS",
)  # fmt: skip
VALUES = (
    "",
    "0",
    "1",
    "2",
    "4",
    "8",
    "-1",
    "1.5",
    "two",
    "²",
    " 2",
    "9" * 40,
    "True",
    "no",
    "bf16",
    "10.0.0.1",
    "\x1b[2J",
)


def random_variables(seed: int) -> dict[str, str]:
    """Returns some launcher variables: often a complete set of torchrun's, often with one of them wrong."""
    generator = random.Random(seed)
    variables = dict(TORCHRUN) if generator.random() < 0.4 else {}
    for name in generator.sample(VARIABLES, generator.randint(1, 6)):
        variables[name] = generator.choice(VALUES)
    if variables and generator.random() < 0.3:
        del variables[generator.choice(list(variables))]
    return variables


def surroundings(variables: dict[str, str]) -> "mock._patch_dict":
    """Replaces all launcher variables of this process."""
    return mock.patch.dict(os.environ, without_launchers(os.environ) | variables, clear=True)


@pytest.mark.parametrize("block", range(4))
def test_random_launcher_variables_give_one_process_consistent_ranks_or_one_line(block: int) -> None:
    refused = 0
    for seed in range(50 * block, 50 * (block + 1)):
        variables = random_variables(seed)
        with surroundings(variables):
            try:
                env = read_environment()
                if env.world_size > 1:
                    assert env.rank < env.world_size >= env.local_world_size > env.local_rank, variables
                    assert all(variables.get(name, "").isdecimal() for name in ("RANK", "WORLD_SIZE")), variables
                    continue
                world = World(TrainSettings(device="cpu", precision="fp32"))
                assert (world.rank, world.size, world.device.type) == (0, 1, "cpu"), variables
                AcceleratorState._reset_state(reset_partial_state=True)
            except WorldError as error:
                assert str(error).isprintable(), variables
                refused += 1
        with surroundings(without_launchers(variables)):  # as `samecurve train` starts its ranks
            assert read_environment().world_size == 1
    assert 5 < refused < 45


def test_complete_set_of_torchrun_is_a_rank() -> None:
    with surroundings(
        TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True", "PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "9"}
    ):
        env = read_environment()
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (3, 4, 1, 2)
    assert env.has_launcher_store and not env.is_one_machine


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"RANK": "4"}, "RANK is not below WORLD_SIZE"),
        ({"RANK": None}, "RANK is not set"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is not a number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is not a number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is not below LOCAL_WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "8"}, "a machine has more ranks than there are in all"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is not the number of a port"),
    ],
)
def test_inconsistent_rank_variables_are_refused_in_one_line(
    changes: dict[str, str | None], problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    variables = {name: value for name, value in (TORCHRUN | changes).items() if value is not None}
    with surroundings(variables):
        assert main.main(["--config", "digits"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("samecurve: ") and err.count("\n") == 1 and problem in err and "unset" in err


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpirun started 2 processes"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "launch/accelerate/multi_cpu.yaml"),
    ],
)
def test_processes_that_would_train_alone_are_refused(variables: dict[str, str], launcher: str) -> None:
    with surroundings(variables), pytest.raises(WorldError, match=launcher):
        read_environment()


@pytest.mark.parametrize(
    "variables", [{"SLURM_STEP_NUM_TASKS": "4"}, {"PMI_SIZE": "2"}, {"MASTER_PORT": "1"}, {"PMI_SIZE": "two"}]
)
def test_variables_without_a_rank_are_left_over(variables: dict[str, str]) -> None:
    with surroundings(variables):
        assert World(TrainSettings(device="cpu", precision="fp32")).size == 1


def test_one_process_per_machine_needs_no_local_rank() -> None:
    variables = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL_")}
    with surroundings(variables):
        env = read_environment()
    assert (env.local_rank, env.local_world_size, env.is_one_machine) == (0, 1, False)
