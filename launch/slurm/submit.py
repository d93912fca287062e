"""Implements `samecurve submit`: checks the settings before a job waits in the queue, then calls sbatch."""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from launch import forecast, preflight
from launch.forecast import RankLayout
from launch.hardware import Machine, this_machine
from launch.plan import EnvironmentVariable, LaunchPlan
from launch.slurm import array, client, scripts
from launch.slurm.queue import read_queue
from launch.slurm.retry import JobRecord
from launch.torchrun import config_arguments
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, FolderError
from trainer.run.files import write_problem
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord
from trainer.text.escape import escape

# Options that sbatch has under the same name and that do not affect the ranks.
_SBATCH_OPTIONS = ("time", "partition", "account", "qos", "mem", "constraint", "nodelist", "exclude")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `samecurve submit`."""
    add_resource_options(parser)
    parser.add_argument(
        "--array", metavar="SEEDS", help="one run per seed: 0-4 or 1,3,7; append %%2 to run two at a time"
    )
    parser.add_argument("--after", metavar="JOB", help="start after this job has finished successfully")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the sbatch command and a forecast of the run, and exit"
    )


def add_resource_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for a job's resources, under the names that sbatch uses."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--gpus-per-node", type=int, default=0, metavar="G", help="one rank per GPU; default: 0, the CPU"
    )
    parser.add_argument("--ntasks-per-node", type=int, default=1, metavar="N", help="ranks per node, without GPUs")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores of each rank")
    for name in _SBATCH_OPTIONS:
        parser.add_argument(f"--{name}", metavar=name[0].upper(), help="passed on to sbatch")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other option of sbatch")
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N",
        help="attempts in a row without progress before the job gives up; default: 3",
    )  # fmt: skip
    parser.add_argument("--doctor", action="store_true", help="check the nodes with samecurve doctor before training")


@dataclass(frozen=True, slots=True)
class JobTask:
    """One run of a job: the only one, or a task of its array."""

    number: int | None
    """the array task number; None: the job is no array"""
    config: RunConfig


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Checks the settings, submits the job, and prints where its log and its run folders are."""
    tasks = list_tasks(arguments, overrides)
    check_tasks(arguments, tasks)
    if arguments.after:
        client.check_dependency(arguments.after)
    machine = this_machine()
    plan = plan_submission(arguments, overrides, tasks, machine)
    environment = scripts.site_environment(plan.environment, machine.install_root)
    if arguments.dry_run:
        print(escape(plan, keep="\n"))
        return 0
    job_id = call_sbatch(plan, environment, machine)
    print(f"job {job_id}: {plan.title.removeprefix('samecurve submit ')}", flush=True)
    log = record_job(job_id, tasks, machine)
    folder, run = tasks[0].config.folder, run_argument(tasks[0].config)
    print(f"log         {log}")
    print(f"run folder  {folder}" + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else ""))
    print(f"to look     samecurve status {run}; samecurve logs {run} --follow")
    print(f"to stop     samecurve stop {run}; scancel {job_id} stops the whole job, also with a checkpoint")
    return 0


def run_argument(config: RunConfig) -> str:
    """Returns a run as other commands accept it, quoted for a shell: its name, or its path outside runs/."""
    return shlex.quote(config.run.name if config.run.root == "runs" else str(config.folder))


def list_tasks(arguments: argparse.Namespace, overrides: list[str]) -> list[JobTask]:
    """Returns every run of the job with its checked settings. Raises ConfigError."""
    if arguments.array is None:
        return [JobTask(None, forecast.load_settings(arguments.config, overrides))]
    files = arguments.config
    return [
        JobTask(seed, forecast.load_settings(files, array.settings_of_seed(seed, files, overrides)))
        for seed in array.parse_seeds(arguments.array)
    ]


def requested_layout(arguments: argparse.Namespace) -> RankLayout:
    """Returns the nodes and ranks that the options request. Raises ConfigError for impossible numbers."""
    for name, minimum in (("nodes", 1), ("ntasks_per_node", 1), ("gpus_per_node", 0)):
        value = getattr(arguments, name)
        if value < minimum:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected {minimum} or more")
    if arguments.gpus_per_node:
        return RankLayout(arguments.nodes, arguments.gpus_per_node, "gpu")
    return RankLayout(arguments.nodes, arguments.ntasks_per_node, "cpu")


def check_tasks(arguments: argparse.Namespace, tasks: list[JobTask]) -> None:
    """Raises UserError for problems that would otherwise show only after hours in the queue."""
    layout = requested_layout(arguments)
    folders = [RunFolder(task.config.folder) for task in tasks]
    for task, folder in zip(tasks, folders, strict=True):
        if task.config.train.device == "cuda" and layout.device == "cpu":
            raise ConfigError("train.device=cuda, but the job requests no GPU; add --gpus-per-node")
        if folder.is_in_use():
            raise FolderError(
                f"another process uses run folder {folder.path}; wait for its end, or choose another run.name"
            )
    preflight.check_runs((task.config for task in tasks), layout)
    jobs = [job for folder in folders if (job := RunRecord(folder.path).submitted_job)]
    queue = read_queue(jobs)
    for job in jobs:
        if queue.problem:
            raise client.SlurmError(
                f"job {job} for this run may still be in the queue, which cannot be read ({queue.problem}); try again, "
                "or choose another run.name"
            )
        if queue.find(job):
            raise FolderError(
                f"job {job} for this run is already in the queue; wait for it, or choose another run.name"
            )


def plan_submission(
    arguments: argparse.Namespace, overrides: list[str], tasks: list[JobTask], machine: Machine
) -> LaunchPlan:
    """Returns the sbatch command with the forecast of the run."""
    layout = requested_layout(arguments)
    config = tasks[0].config
    argv = sbatch_arguments(arguments, machine, config.run.name, arguments.array)
    train_script = scripts.scripts_folder(machine.install_root) / "train.sh"
    argv += [str(train_script), *config_arguments(arguments.config)]
    argv += [f"--max-restarts={arguments.max_restarts}"] + (["--doctor"] if arguments.doctor else [])
    facts = list(forecast.describe_run(config, layout))
    if arguments.array:
        folders = ", ".join(str(task.config.folder) for task in tasks)
        facts = [fact for fact in facts if fact[0] != "run folder"]
        facts += [("seeds", ", ".join(str(task.number) for task in tasks)), ("run folders", folders)]
    title = f"samecurve submit {config.run.name} on {layout}"
    return LaunchPlan(title, (*argv, *overrides), job_variables(machine), tuple(facts), notes(arguments))


def sbatch_arguments(
    arguments: argparse.Namespace, machine: Machine, name: str, array_tasks: str | None = None
) -> list[str]:
    """Returns sbatch with its options, without a script. They take precedence over the #SBATCH lines of a script.

    array_tasks: the value of sbatch's --array, such as 0-4%2; None: no array.
    """
    logs = str(scripts.log_folder(machine.install_root)).replace("%", "%%")
    client.check_sbatch_options(arguments.sbatch)
    argv = ["sbatch", "--parsable", f"--job-name={name}", f"--output={logs}/{'%A_%a' if array_tasks else '%j'}.log"]
    argv += [f"--nodes={arguments.nodes}"]
    argv += [f"--gpus-per-node={arguments.gpus_per_node}"] if arguments.gpus_per_node else []
    argv += [f"--ntasks-per-node={1 if arguments.gpus_per_node else arguments.ntasks_per_node}"]
    if arguments.cpus_per_task:  # with GPUs, one task holds all ranks of a node
        argv.append(f"--cpus-per-task={arguments.cpus_per_task * max(1, arguments.gpus_per_node)}")
    argv += [f"--{option}={getattr(arguments, option)}" for option in _SBATCH_OPTIONS if getattr(arguments, option)]
    argv += [f"--array={array_tasks}"] if array_tasks else []
    argv += [f"--dependency=afterok:{arguments.after}"] if getattr(arguments, "after", None) else []
    return [*argv, *arguments.sbatch]


def job_variables(machine: Machine) -> tuple[EnvironmentVariable, ...]:
    """Returns the environment variables that the batch scripts read."""
    scripts_folder = str(scripts.scripts_folder(machine.install_root))
    return (
        EnvironmentVariable("SAMECURVE_HOME", str(machine.install_root), "where the job finds this project"),
        EnvironmentVariable("SAMECURVE_SCRIPTS", scripts_folder, "where the job finds its scripts and the site file"),
        EnvironmentVariable("SAMECURVE_PYTHON", machine.python, "the job runs in the same virtual environment"),
    )


def notes(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Returns the notes below the plan."""
    if arguments.gpus_per_node:
        return ()
    return ("this job requests no GPU and trains on the CPU; request one with --gpus-per-node 1",)


def call_sbatch(plan: LaunchPlan, environment: Mapping[str, str], machine: Machine) -> str:
    """Queues the job and returns its id. Raises SlurmError, and FolderError if the job could not write its log.

    environment: that of the plan, after the site file.
    """
    scripts.create_log_folder(machine.install_root)
    return client.submit(*plan.argv, env=environment)


def record_job(job_id: str, tasks: list[JobTask], machine: Machine) -> str:
    """Writes job.json into each run folder. Returns the path of the log, with a * for the task number of an array.

    Raises FolderError if a folder cannot be written. The message has the job's id, because the job is queued already.
    """
    logs = scripts.log_folder(machine.install_root)
    for task in tasks:
        name = job_id if task.number is None else f"{job_id}_{task.number}"
        try:
            JobRecord(job_id, task.number, str(logs / f"{name}.log")).write(RunFolder(task.config.folder))
        except FolderError:
            raise FolderError(
                f"job {job_id} is in the queue, but its run folder {task.config.folder} cannot be written "
                f"({write_problem(task.config.folder)}); repair that before the job starts, or scancel {job_id}"
            ) from None
    return str(logs / (f"{job_id}_*.log" if tasks[0].number is not None else f"{job_id}.log"))
