"""`samecurve train`: this machine, all its GPUs, or CPU ranks; settings and a machine in, a plan out, then a run."""

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

from launch import forecast
from launch.forecast import Layout
from launch.hardware import Machine, look
from launch.plan import LaunchPlan, Variable
from trainer import outcome
from trainer.errors import ConfigError, WorldError
from trainer.settings import RunConfig

# As long as a step and a save may take; torchrun's own 30 s would lose them.
SHUTDOWN_TIMEOUT_SECONDS = 600
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, metavar="N", help="processes; default: one a GPU, or one on the CPU")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="start the ranks again when one dies; default: 0"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be started, and leave")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Plans, and runs unless it is a dry run; the exit code of trainer/main.py."""
    if arguments.max_restarts < 0:
        raise ConfigError(f"--max-restarts {arguments.max_restarts}: wanted 0 or more")
    config = forecast.load(arguments.config, overrides)
    machine = look()
    layout = choose(config, machine, arguments.ranks)
    forecast.check(config, layout.world_size)
    plan = make(config, machine, layout, [*named(arguments.config), *overrides], arguments.max_restarts)
    if arguments.dry_run:
        print(plan)
        return 0
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    return run(plan, config.folder)


def named(files: list[str]) -> list[str]:
    """The files as trainer/main.py wants them."""
    return [word for name in files for word in ("--config", name)]


def choose(config: RunConfig, machine: Machine, ranks: int | None) -> Layout:
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
    return Layout(1, ranks, "gpu" if on_gpu else "cpu")


def make(config: RunConfig, machine: Machine, layout: Layout, trained: list[str], max_restarts: int) -> LaunchPlan:
    """trained: the arguments of trainer/main.py."""
    bare = command(
        f"samecurve train {config.run.name}", config, machine, layout, [machine.trainer, *trained], max_restarts
    )
    return dataclasses.replace(bare, facts=forecast.facts(config, layout))


def command(
    title: str, config: RunConfig, machine: Machine, layout: Layout, script: list[str], max_restarts: int = 0
) -> LaunchPlan:
    """A script and its arguments on so many ranks of this machine, through torchrun when there are several."""
    ranks = layout.ranks_per_node
    variables: list[Variable] = []
    argv = [machine.python, *script]
    if ranks > 1 or max_restarts:
        argv = [machine.python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        argv += [f"--max-restarts={max_restarts}", *script]
        variables = [threads(config, machine.cores, ranks), *torchrun_variables()]
    notes = []
    if layout.device == "cpu" and ranks > machine.cores:
        notes.append(f"{ranks} ranks share {machine.cores} cores; they will be slower than {machine.cores} ranks")
    return LaunchPlan(title, tuple(argv), tuple(variables), (), tuple(notes))


def threads(config: RunConfig, cores: int, ranks: int) -> Variable:
    """How many threads each rank may have."""
    asked = config.train.threads_per_rank
    if isinstance(asked, int):
        return Variable("OMP_NUM_THREADS", str(asked), "train.threads_per_rank; torchrun would set 1")
    why = f"{cores} core{'s' if cores > 1 else ''} for {ranks} rank{'s' if ranks > 1 else ''}; torchrun would set 1"
    return Variable("OMP_NUM_THREADS", str(max(1, cores // ranks)), why)


def torchrun_variables() -> list[Variable]:
    """What torchrun has wrong for a run that saves when it is stopped."""
    return [
        Variable("PET_SIGNALS_TO_HANDLE", SIGNALS, "passed on to the ranks; SIGUSR1 would kill torchrun"),
        Variable(
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
            str(SHUTDOWN_TIMEOUT_SECONDS),
            "seconds for a step's end and a save before ranks are killed, not 30",
        ),
    ]


GOES_ON = "The same command goes on from its last checkpoint"


def run(plan: LaunchPlan, folder: Path, after_failure: str = GOES_ON) -> int:
    """Runs the plan to its end. One process alone takes this one's place; ranks leave how it ended in a file."""
    if "torch.distributed.run" not in plan.argv:
        sys.stdout.flush()
        os.execve(plan.argv[0], plan.argv, plan.environment)
    from launch.relay import Relay  # late: psutil

    with tempfile.TemporaryDirectory(prefix="samecurve-") as place:
        path = Path(place) / "outcome.json"
        relay = Relay()
        code = relay.run(plan.argv, plan.environment | {outcome.VARIABLE: str(path)})
        return ended(code, outcome.read(path), folder, after_failure)


def ended(code: int, found: tuple[int, str] | None, folder: Path, after_failure: str = GOES_ON) -> int:
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
