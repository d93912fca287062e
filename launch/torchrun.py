"""Ranks on one machine: the torchrun command, its environment variables, and the end of a run."""

import os
import sys
import tempfile
from pathlib import Path

from launch.forecast import RankLayout
from launch.hardware import Machine
from launch.plan import LaunchPlan, Variable
from trainer.config.schema import RunConfig
from trainer.errors import WorldError
from trainer.run.exit import OUTCOME_VARIABLE, read_outcome

# As long as a step and a save may take; torchrun's own 30 s would lose them.
SHUTDOWN_TIMEOUT_SECONDS = 600


FORWARDED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def config_arguments(files: list[str]) -> list[str]:
    """The files as trainer/main.py wants them."""
    return [word for name in files for word in ("--config", name)]


def choose_layout(config: RunConfig, machine: Machine, ranks: int | None) -> RankLayout:
    """As many ranks as were asked for, or one a GPU. Raises WorldError when the machine has not what is wanted."""
    device = config.train.device
    if device == "cuda" and not machine.gpus:
        raise WorldError("train.device=cuda: this machine has no usable GPU; set train.device=auto or mend its driver")
    on_gpu = machine.gpus > 0 and device != "cpu"
    ranks = (machine.gpus if on_gpu else 1) if ranks is None else ranks
    if ranks < 1:
        raise WorldError(f"--ranks {ranks}: wanted 1 or more")
    if on_gpu and ranks > machine.gpus:
        raise WorldError(
            f"--ranks {ranks} but {machine.gpus} GPUs: wanted one GPU a rank. "
            f"Ask for {machine.gpus} at most, or run on the CPU with train.device=cpu"
        )
    return RankLayout(1, ranks, "gpu" if on_gpu else "cpu")


def plan_ranks(
    title: str, config: RunConfig, machine: Machine, layout: RankLayout, script: list[str], max_restarts: int = 0
) -> LaunchPlan:
    """A script and its arguments on so many ranks of this machine, through torchrun when there are several."""
    ranks = layout.ranks_per_node
    variables: list[Variable] = []
    argv = [machine.python, *script]
    if ranks > 1 or max_restarts:
        argv = [machine.python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        argv += [f"--max-restarts={max_restarts}", *script]
        variables = [threads_variable(config, machine.cores, ranks), *torchrun_variables()]
    notes = []
    if layout.device == "cpu" and ranks > machine.cores:
        notes.append(f"{ranks} ranks share {machine.cores} cores; they will be slower than {machine.cores} ranks")
    return LaunchPlan(title, tuple(argv), tuple(variables), (), tuple(notes))


def threads_variable(config: RunConfig, cores: int, ranks: int) -> Variable:
    """How many threads each rank may have."""
    asked = config.train.threads_per_rank
    if isinstance(asked, int):
        return Variable("OMP_NUM_THREADS", str(asked), "train.threads_per_rank; torchrun would set 1")
    why = f"{cores} core{'s' if cores > 1 else ''} for {ranks} rank{'s' if ranks > 1 else ''}; torchrun would set 1"
    return Variable("OMP_NUM_THREADS", str(max(1, cores // ranks)), why)


def torchrun_variables() -> list[Variable]:
    """What torchrun has wrong for a run that saves when it is stopped."""
    return [
        Variable("PET_SIGNALS_TO_HANDLE", FORWARDED_SIGNALS, "passed on to the ranks; SIGUSR1 would kill torchrun"),
        Variable(
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
            str(SHUTDOWN_TIMEOUT_SECONDS),
            "seconds for a step's end and a save before ranks are killed, not 30",
        ),
    ]


GOES_ON = "The same command goes on from its last checkpoint"


def run_plan(plan: LaunchPlan, folder: Path, after_failure: str = GOES_ON) -> int:
    """Runs the plan to its end. One process alone takes this one's place; ranks leave how it ended in a file."""
    if "torch.distributed.run" not in plan.argv:
        sys.stdout.flush()
        os.execve(plan.argv[0], plan.argv, plan.environment)
    from launch.signals import SignalForwarder  # late: psutil

    with tempfile.TemporaryDirectory(prefix="samecurve-") as place:
        path = Path(place) / "outcome.json"
        relay = SignalForwarder()
        code = relay.run(plan.argv, plan.environment | {OUTCOME_VARIABLE: str(path)})
        return report_end(code, read_outcome(path), folder, after_failure)


def report_end(code: int, found: tuple[int, str] | None, folder: Path, after_failure: str = GOES_ON) -> int:
    """The exit code of the ranks; a last line after whatever torchrun has said of a failure."""
    if found is not None:
        if found[0] == 2:
            print(f"samecurve: {found[1]}", file=sys.stderr)
        return found[0]
    if code:
        print(
            f"samecurve: the run in {folder} ended before its time (code {code}); the first traceback above says why. "
            f"{after_failure}",
            file=sys.stderr,
        )
    return code
