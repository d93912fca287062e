"""Plans and runs the ranks of one machine: the torchrun command, its environment variables and its exit code."""

import os
import signal
import sys
from pathlib import Path

from launch.elastic import one_machine_options
from launch.forecast import RankLayout
from launch.hardware import Machine
from launch.plan import EnvironmentVariable, LaunchPlan
from trainer.config.schema import RunConfig
from trainer.distributed.environment import without_launchers
from trainer.errors import WorldError
from trainer.process.temporary import temporary_folder
from trainer.run.exit import OUTCOME_VARIABLE, read_outcome
from trainer.run.stop import handled_signals
from trainer.text.escape import escape
from trainer.text.streams import close_again

# Long enough to finish a step and save a checkpoint; torchrun's default of 30 s would lose them.
SHUTDOWN_TIMEOUT_SECONDS = 600
FORWARDED_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
LOG_VARIABLE = "PET_LOG_DIR"
"""torchrun's folder for its ranks; by default it leaves one behind in the temporary folder"""
_CONTINUE_ADVICE = "Run the same command again to continue from the last checkpoint"


def config_arguments(files: list[str]) -> list[str]:
    """Returns the `--config` arguments for trainer/main.py."""
    return [word for name in files for word in ("--config", name)]


def choose_layout(config: RunConfig, machine: Machine, ranks: int | None) -> RankLayout:
    """Returns a layout with `ranks` ranks; None means one rank per GPU, or one on the CPU.

    Raises WorldError if the machine does not have the GPUs that the settings or `ranks` require.
    """
    device = config.train.device
    if device == "cuda" and not machine.gpus:
        raise WorldError("train.device=cuda: this machine has no usable GPU; set train.device=auto or fix its driver")
    use_gpu = machine.gpus > 0 and device != "cpu"
    if ranks is None:
        ranks = machine.gpus if use_gpu else 1
    if ranks < 1:
        raise WorldError(f"--ranks {ranks}: expected 1 or more")
    if use_gpu and ranks > machine.gpus:
        raise WorldError(
            f"--ranks {ranks}: expected one GPU per rank, but the machine has {machine.gpus} GPUs; "
            f"use --ranks {machine.gpus} or fewer, or set train.device=cpu"
        )
    return RankLayout(1, ranks, "gpu" if use_gpu else "cpu")


def plan_ranks(
    title: str, config: RunConfig, machine: Machine, layout: RankLayout, script: list[str], max_restarts: int = 0
) -> LaunchPlan:
    """Returns a plan that runs a script on the ranks of `layout` on this machine.

    One rank without restarts is a plain process; otherwise torchrun starts the ranks.

    script: path and arguments of the script.
    """
    ranks = layout.ranks_per_node
    variables: list[EnvironmentVariable] = []
    argv = [machine.python, *script]
    if ranks > 1 or max_restarts:
        argv = torchrun_command(machine, ranks, f"--max-restarts={max_restarts}", *script)
        variables = [threads_variable(config, machine.cores, ranks), *torchrun_variables()]
    notes = []
    if layout.device == "cpu" and ranks > machine.cores:
        notes.append(f"{ranks} ranks share {machine.cores} cores; they will be slower than {machine.cores} ranks")
    return LaunchPlan(title, tuple(argv), tuple(variables), notes=tuple(notes))


def torchrun_command(machine: Machine, ranks: int, *arguments: str) -> list[str]:
    """Returns the command that starts the ranks of one machine. arguments: torchrun's options, then the script."""
    return [machine.python, machine.elastic, *one_machine_options(), f"--nproc-per-node={ranks}", *arguments]


def threads_variable(config: RunConfig, cores: int, ranks: int) -> EnvironmentVariable:
    """Returns the variable for the threads of each rank. cores, ranks: of one node."""
    threads = config.train.threads_per_rank
    if isinstance(threads, int):
        return EnvironmentVariable("OMP_NUM_THREADS", str(threads), "train.threads_per_rank; torchrun would set 1")
    reason = f"{cores} core{'s' if cores > 1 else ''} for {ranks} rank{'s' if ranks > 1 else ''}; torchrun would set 1"
    return EnvironmentVariable("OMP_NUM_THREADS", str(max(1, cores // ranks)), reason)


def torchrun_variables() -> list[EnvironmentVariable]:
    """Returns the variables that let torchrun's ranks save a checkpoint when they are stopped."""
    names = ",".join(number.name for number in handled_signals(FORWARDED_SIGNALS))  # torchrun would handle all of them
    return [
        EnvironmentVariable("PET_SIGNALS_TO_HANDLE", names, "signals for the ranks; SIGUSR1 would kill torchrun"),
        EnvironmentVariable(
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
            str(SHUTDOWN_TIMEOUT_SECONDS),
            "seconds to finish a step and save before ranks are killed; default 30",
        ),
    ]


def run_plan(plan: LaunchPlan, folder: Path, failure_advice: str = _CONTINUE_ADVICE) -> int:
    """Runs a plan and returns its exit code. A plan without torchrun replaces this process and does not return.

    The ranks get the environment of this process without variables of other launchers, which the shell may hold.

    folder: the run folder, for the message of a failure.
    failure_advice: the last sentence of that message.
    """
    environment = without_launchers(os.environ) | plan.assignments
    if Path(plan.argv[1]).name != "elastic.py":
        sys.stdout.flush()
        close_again()  # the trainer finds the streams as the user left them
        os.execve(plan.argv[0], plan.argv, environment)
    from launch.signals import SignalForwarder  # lazy import: psutil

    with temporary_folder() as folder_of_launch:
        outcome_path = folder_of_launch / "outcome.json"
        variables = {OUTCOME_VARIABLE: str(outcome_path), LOG_VARIABLE: str(folder_of_launch / "logs")}
        forwarder = SignalForwarder()
        torchrun_code = forwarder.run(plan.argv, variables | environment)
        outcome = read_outcome(outcome_path)
    if outcome is None and torchrun_code and forwarder.received is not None:
        print(f"samecurve: {forwarder.received.name} ended the run in {escape(folder)} early", file=sys.stderr)
        return 128 + forwarder.received
    return _report_exit(torchrun_code, outcome, folder, failure_advice)


def _report_exit(torchrun_code: int, outcome: tuple[int, str] | None, folder: Path, failure_advice: str) -> int:
    """Returns the exit code of the ranks. On failure, prints a last line below the output of torchrun.

    outcome: exit code and reason that the ranks wrote to the outcome file; None if they ended without writing it.
    """
    if outcome is not None:
        code, reason = outcome
        if code == 2:
            print(f"samecurve: {escape(reason)}", file=sys.stderr)
        return code
    if torchrun_code:
        print(
            f"samecurve: the run in {escape(folder)} failed (code {torchrun_code}); the first traceback above shows "
            f"the cause. {failure_advice}",
            file=sys.stderr,
        )
    return torchrun_code
