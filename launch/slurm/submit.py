"""`samecurve submit`: the settings are checked here, before a job waits in a queue; then sbatch is called."""

import argparse
import shlex
from dataclasses import dataclass

from launch import forecast
from launch.forecast import RankLayout
from launch.hardware import INSTALL_ROOT, Machine, this_machine
from launch.plan import LaunchPlan, Variable
from launch.slurm import array, client
from launch.slurm.queue import Job, read_queue
from launch.slurm.retry import JobRecord
from launch.torchrun import config_arguments
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, FolderError
from trainer.run.folder import RunFolder

# Options that sbatch has by the same name and that say nothing of the ranks.
_PASSED_ON = ("time", "partition", "account", "qos", "mem", "constraint", "nodelist", "exclude")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_resources(parser)
    parser.add_argument("--array", metavar="SEEDS", help="one run a seed: 0-4, 1,3,7; %%2 behind it: two at once")
    parser.add_argument("--after", metavar="JOB", help="start when that job has finished well")
    parser.add_argument("--dry-run", action="store_true", help="show sbatch's call and what will come of it, and leave")


def add_resources(parser: argparse.ArgumentParser) -> None:
    """What a job asks for, in sbatch's own words."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="ranks a node; default: 0, the CPU")
    parser.add_argument("--ntasks-per-node", type=int, default=1, metavar="N", help="without GPUs: ranks a node")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores of each rank")
    for name in _PASSED_ON:
        parser.add_argument(f"--{name}", metavar=name[0].upper(), help="as sbatch has it")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other option of sbatch")
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="attempts without progress; default: 3"
    )
    parser.add_argument("--doctor", action="store_true", help="the job looks for what would go wrong first")


@dataclass(frozen=True, slots=True)
class Task:
    """One run of the job: itself, or a task of its array."""

    number: int | None
    config: RunConfig


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Checks, submits, and says where everything will be."""
    tasks = tasks_of(arguments, overrides)
    check(arguments, tasks)
    plan = make(arguments, overrides, tasks, this_machine())
    if arguments.dry_run:
        print(plan)
        return 0
    job_id, log = submit(plan, tasks)
    folder, what = tasks[0].config.folder, named_run(tasks[0].config)
    print(f"job {job_id}: {plan.title.removeprefix('samecurve submit ')}")
    print(f"log         {log}")
    print(f"run folder  {folder}" + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else ""))
    print(f"to look     samecurve status {what}; samecurve logs {what} --follow")
    print(f"to stop     samecurve stop {what}; scancel {job_id} ends all of it, with a checkpoint too")
    return 0


def named_run(config: RunConfig) -> str:
    """A run as the other commands want it: by its name, or by its path where that lies elsewhere."""
    return shlex.quote(config.run.name if config.run.root == "runs" else str(config.folder))


def tasks_of(arguments: argparse.Namespace, overrides: list[str]) -> list[Task]:
    """Every run that the job will make, its settings checked. Raises ConfigError."""
    if arguments.array is None:
        return [Task(None, forecast.load_settings(arguments.config, overrides))]
    return [
        Task(seed, forecast.load_settings(arguments.config, array.settings_of_seed(seed, arguments.config, overrides)))
        for seed in array.parse_seeds(arguments.array)
    ]


def layout_of(arguments: argparse.Namespace) -> RankLayout:
    """Raises ConfigError for numbers that no cluster has."""
    for name in ("nodes", "ntasks_per_node"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: wanted 1 or more")
    if arguments.gpus_per_node < 0:
        raise ConfigError(f"--gpus-per-node {arguments.gpus_per_node}: wanted 0 or more")
    if arguments.gpus_per_node:
        return RankLayout(arguments.nodes, arguments.gpus_per_node, "gpu")
    return RankLayout(arguments.nodes, arguments.ntasks_per_node, "cpu")


def check(arguments: argparse.Namespace, tasks: list[Task]) -> None:
    """Raises UserError for what would fail after a night in the queue."""
    layout = layout_of(arguments)
    folders = [RunFolder(task.config.folder) for task in tasks]
    for task, folder in zip(tasks, folders, strict=True):
        if task.config.train.device == "cuda" and layout.device == "cpu":
            raise ConfigError("train.device=cuda, but the job asks for no GPU; add --gpus-per-node")
        forecast.check(task.config, layout.world_size)
        if folder.in_use():
            raise FolderError(f"a run is on in {folder.path}; wait for it, or choose another run.name")
    known = [Job(found["job_id"], found["array_task"]) for each in folders if (found := each.read_json("job.json"))]
    queue = read_queue(known)
    for job in known:
        if queue.find(job):
            raise FolderError(f"job {job} has this run in the queue; wait for it, or choose another run.name")


def make(arguments: argparse.Namespace, overrides: list[str], tasks: list[Task], machine: Machine) -> LaunchPlan:
    """The sbatch call."""
    layout = layout_of(arguments)
    config = tasks[0].config
    more = ["--array", arguments.array] if arguments.array else []
    argv = sbatch(arguments, machine, config.run.name, more)
    argv += [str(machine.repository / "slurm" / "train.sh"), *config_arguments(arguments.config)]
    argv += [f"--max-restarts={arguments.max_restarts}"] + (["--doctor"] if arguments.doctor else [])
    facts = list(forecast.facts(config, layout))
    if arguments.array:
        folders = ", ".join(str(task.config.folder) for task in tasks)
        facts = [fact for fact in facts if fact[0] != "run folder"]
        facts += [("seeds", ", ".join(str(task.number) for task in tasks)), ("run folders", folders)]
    title = f"samecurve submit {config.run.name} on {layout}"
    return LaunchPlan(title, (*argv, *overrides), variables(machine), tuple(facts), notes(arguments))


def sbatch(arguments: argparse.Namespace, machine: Machine, name: str, more: list[str]) -> list[str]:
    """sbatch and its options, as far as a script's own header does not have them."""
    logs = machine.repository / "slurm" / "logs"
    pattern = "%A_%a.log" if "--array" in more else "%j.log"
    argv = ["sbatch", "--parsable", f"--job-name={name}", f"--output={str(logs).replace('%', '%%')}/{pattern}"]
    argv += [f"--nodes={arguments.nodes}"]
    argv += [f"--gpus-per-node={arguments.gpus_per_node}"] if arguments.gpus_per_node else []
    argv += [f"--ntasks-per-node={1 if arguments.gpus_per_node else arguments.ntasks_per_node}"]
    cpus = arguments.cpus_per_task
    if cpus:  # a GPU's rank is no task of its own
        argv.append(f"--cpus-per-task={cpus * max(1, arguments.gpus_per_node)}")
    argv += [f"--{name}={getattr(arguments, name)}" for name in _PASSED_ON if getattr(arguments, name)]
    argv += [f"{more[0]}={more[1]}"] if more else []
    argv += [f"--dependency=afterok:{arguments.after}"] if getattr(arguments, "after", None) else []
    argv += arguments.sbatch
    return client.with_site_file(argv, machine.repository)


def variables(machine: Machine) -> tuple[Variable, ...]:
    return (
        Variable("SAMECURVE_HOME", str(machine.repository), "where the job finds this project"),
        Variable("SAMECURVE_PYTHON", machine.python, "the job runs in the same virtual environment"),
    )


def notes(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.gpus_per_node:
        return ()
    return ("this job asks for no GPU and trains on the CPU; --gpus-per-node 1 asks for one",)


def submit(plan: LaunchPlan, tasks: list[Task]) -> tuple[str, str]:
    """Calls sbatch; leaves the job's number in each run folder, for whoever looks at it; job id and log's path."""
    job_id = client.call(*plan.argv, env=plan.environment).strip().splitlines()[-1].partition(";")[0]
    logs = INSTALL_ROOT / "slurm" / "logs"
    for task in tasks:
        name = job_id if task.number is None else f"{job_id}_{task.number}"
        JobRecord(job_id, task.number, str(logs / f"{name}.log")).write(RunFolder(task.config.folder))
    return job_id, str(logs / (f"{job_id}_*.log" if tasks[0].number is not None else f"{job_id}.log"))
