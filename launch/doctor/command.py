"""Implements `samecurve doctor`: reports what would make a run fail here, in a job, or among the ranks of torchrun.

Measures (node/server.py on each node, node/probe.py as each rank), then judges (judge/diagnosis.py), in under a minute.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.hardware import INSTALL_ROOT, Machine, this_machine
from trainer.distributed.environment import has_rank_variables
from trainer.errors import ConfigError, UserError, WorldError
from trainer.process.launcher import find_launcher
from trainer.text.escape import escape

if TYPE_CHECKING:  # the servers on the nodes start from this file too, and need none of these
    from launch.doctor.examination import Examination
    from launch.doctor.nodes import Nodes
    from launch.doctor.torchrun import Rendezvous
    from trainer.config.schema import RunConfig

_MAIN_SCRIPT = str(INSTALL_ROOT / "launch" / "main.py")
_FACTS_SHARE = 0.5  # of the time limit
_REACH_SECONDS, _END_SECONDS = 15.0, 4.0
_MIN_SECONDS = 5.0
_NODE_FROM_SRUN = -1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `samecurve doctor`."""
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="ranks per node; default: one per GPU, or one on the CPU")
    add("--nodes", type=int, metavar="N", help="outside a job: examine this many nodes of the SLURM cluster")
    add("--gpus-per-node", type=int, metavar="G", help="GPUs that each node should have")
    add("--partition", metavar="P", help="partition of the SLURM cluster")
    add("--short", action="store_true", help="check facts and connections only: no matrix products, no all-reduce")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--timeout-seconds", type=float, default=60.0, metavar="S", help="time limit of the examination; default: 60")
    add("--as-node", type=int, metavar="NODE", help=argparse.SUPPRESS)


@dataclass(frozen=True, slots=True)
class Target:
    """The nodes to examine, and the commands that start the doctor's servers on them."""

    names: tuple[str, ...]
    head: str
    """name or address of the first node"""
    ranks_per_node: int
    gpus_per_node: int
    commands: tuple[tuple[str, ...], ...]
    """commands that serve nodes and talk through a pipe"""
    rendezvous: "Rendezvous | None" = None
    """under torchrun: where processes of the other nodes connect"""


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Examines and reports. Returns 0 when nothing would fail, else 1. Raises UserError for invalid options."""
    if arguments.as_node is not None:
        from launch.doctor.node import server

        node = int(os.environ["SLURM_PROCID"]) if arguments.as_node == _NODE_FROM_SRUN else arguments.as_node
        return server.serve(sys.stdin, sys.stdout, node)
    if arguments.timeout_seconds < _MIN_SECONDS:
        raise ConfigError(f"--timeout-seconds {arguments.timeout_seconds:g}: expected {_MIN_SECONDS:g} or more")
    for option, value in (("--ranks", arguments.ranks), ("--nodes", arguments.nodes)):
        if value is not None and value < 1:
            raise WorldError(f"{option} {value}: expected 1 or more")
    if _is_rank():
        from launch.doctor import torchrun

        if not torchrun.is_first():
            return torchrun.serve(arguments.timeout_seconds)
    elif not _is_in_job() and (arguments.nodes or arguments.partition):
        from launch.doctor import job

        return job.submit(arguments, overrides)
    from launch import forecast  # lazy import: 0.1 s

    return _examine_and_report(arguments, forecast.load_settings(arguments.config, overrides))


def _examine_and_report(arguments: argparse.Namespace, config: "RunConfig") -> int:
    from launch.doctor.judge import diagnosis, findings

    begin = time.monotonic()
    target = _find_target(arguments, config.train.device, this_machine())
    request = _run_needs(arguments, config, target)
    exam = _examine(target, request, arguments, begin + arguments.timeout_seconds)
    results, names = diagnosis.judge(exam), [exam.name(node) for node in exam.nodes]
    seconds = time.monotonic() - begin
    if arguments.json:
        header = {"nodes": names, "ranks_per_node": target.ranks_per_node, "seconds": round(seconds, 1)}
        print(findings.to_json(results, header), flush=True)
    else:
        nodes = f"{len(names)} nodes ({', '.join(names)})" if len(names) > 1 else names[0]
        ranks = f"{target.ranks_per_node} rank{'s' if target.ranks_per_node > 1 else ''} each"
        text = findings.to_text(results, f"samecurve doctor: {nodes}, {ranks}, {seconds:.1f} s")
        print(escape(text, keep="\n"), flush=True)
    return int(findings.has_failure(results))


def _find_target(arguments: argparse.Namespace, device: str, machine: Machine) -> Target:
    """Returns the nodes of torchrun, of the current job, or this machine. Raises UserError when they do not fit."""
    if _is_rank():
        return _torchrun_target(arguments, device, machine)
    if _is_in_job():
        return _job_target(arguments, machine)
    on_gpu = machine.gpus > 0 and device != "cpu"
    gpus = arguments.gpus_per_node
    ranks = arguments.ranks or gpus or (machine.gpus if on_gpu else 1)
    gpus = (ranks if on_gpu or device == "cuda" else 0) if gpus is None else gpus
    return Target((os.uname().nodename,), "127.0.0.1", ranks, gpus, (_server_command(machine, 0),))


def _is_in_job() -> bool:
    """Returns whether SLURM started this process. A shell may have SLURM_JOB_ID alone."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_JOB_NODELIST" in os.environ


def _is_rank() -> bool:
    """Returns whether torchrun started this process. A shell may hold variables of ranks, left over."""
    return has_rank_variables() and find_launcher() != 0


def _torchrun_target(arguments: argparse.Namespace, device: str, machine: Machine) -> Target:
    from launch.doctor import torchrun

    rendezvous = torchrun.read_rendezvous()
    names = tuple(f"node {node}" for node in range(rendezvous.num_nodes))
    on_gpu = device == "cuda" or (device == "auto" and machine.gpus > 0)
    gpus = arguments.gpus_per_node
    gpus = (rendezvous.ranks_per_node if on_gpu else 0) if gpus is None else gpus
    command = _server_command(machine, 0)
    return Target(names, rendezvous.address, rendezvous.ranks_per_node, gpus, (command,), rendezvous)


def _job_target(arguments: argparse.Namespace, machine: Machine) -> Target:
    from launch.doctor import job
    from launch.slurm import batch, client

    allocation = client.read_allocation()
    num_nodes = len(allocation.nodes)
    if arguments.nodes and arguments.nodes != num_nodes:
        raise WorldError(f"--nodes {arguments.nodes}, but this job has {num_nodes} nodes; leave the option out")
    gpus = allocation.gpus_per_node if arguments.gpus_per_node is None else arguments.gpus_per_node
    ranks = arguments.ranks or allocation.ranks_per_node
    command = job.step_command(allocation, _server_command(machine, _NODE_FROM_SRUN))
    return Target(allocation.nodes, batch.node_address(allocation.nodes[0]), ranks, gpus, (command,))


def _server_command(machine: Machine, node: int) -> tuple[str, ...]:
    return (machine.python, _MAIN_SCRIPT, "doctor", "--as-node", str(node))


def _run_needs(arguments: argparse.Namespace, config: "RunConfig", target: Target) -> dict[str, Any]:
    """Returns what the run needs. Paths are absolute, as a node's server may start in another folder."""
    from launch.slurm import client
    from trainer.config.validate import check_ranks
    from trainer.distributed.environment import read_environment
    from trainer.tracking.wandb_mode import resolve_mode

    wandb_mode, wandb_problem = "off", ""
    try:
        wandb_mode = resolve_mode(config.log.wandb)
    except UserError as error:
        wandb_problem = str(error)
    try:
        read_environment()
        launcher_problem = ""
        if has_rank_variables() and not _is_rank():
            launcher_problem = "the environment has RANK and WORLD_SIZE, but torchrun has not started this process"
    except WorldError as error:
        launcher_problem = str(error)
    try:
        check_ranks(config, len(target.names) * target.ranks_per_node)
        settings_problem = ""
    except WorldError as error:
        settings_problem = str(error)
    root = Path(config.run.root).expanduser().absolute()
    data_root = Path(config.data.root).expanduser().absolute()
    return {
        "head": target.head,
        "seconds": arguments.timeout_seconds,
        "ranks_per_node": target.ranks_per_node,
        "gpus_per_node": target.gpus_per_node,
        "device": config.train.device,
        "run_root": str(root),
        "run_folder": str(root / config.run.name),
        "data": {"name": config.data.name, "root": str(data_root), "download": config.data.download},
        "workers": config.data.workers,
        "wandb": wandb_mode,
        "wandb_problem": wandb_problem,
        "settings": settings_problem,
        "launcher": launcher_problem,
        "clock_offset": client.clock_offset() if "SLURM_JOB_ID" in os.environ else None,
    }


def _examine(target: Target, request: dict[str, Any], arguments: argparse.Namespace, deadline: float) -> "Examination":
    """Queries all nodes until the deadline. Leaves nothing behind on any node nor in the run folder."""
    from launch.doctor.examination import Examination
    from launch.doctor.nodes import Nodes
    from launch.doctor.shared_folder import SharedFolder
    from launch.slurm import client

    facts_seconds = _FACTS_SHARE * arguments.timeout_seconds
    nodes = Nodes(range(len(target.names)))
    shared = SharedFolder(Path(request["run_root"]))
    try:
        for command in target.commands:
            nodes.start(command, client.without_task_variables(os.environ))
        if target.rendezvous is not None:
            target.rendezvous.accept_nodes(nodes, time.monotonic() + facts_seconds / 2)
        facts = nodes.request("facts", request, deadline - facts_seconds)
        listeners = {node: (reply["address"], reply["port"]) for node, reply in facts.items()}
        reach_request = {"listeners": listeners, "shared": {"folder": str(shared.folder), "token": shared.token}}
        reach = nodes.request("reach", reach_request, min(deadline, time.monotonic() + _REACH_SECONDS))
        answered = shared.answered_nodes(reach)
        exam = Examination(target.names, request, facts, reach, answered, shared.problem)
        return exam if arguments.short else _measure_ranks(nodes, exam, deadline - _END_SECONDS)
    finally:
        shared.remove()
        nodes.close()


def _measure_ranks(nodes: "Nodes", exam: "Examination", deadline: float) -> "Examination":
    """Adds the measurements of the ranks on all nodes that reach each other."""
    probed = exam.connected_nodes()
    seconds = deadline - time.monotonic()
    if not probed or seconds < _MIN_SECONDS:
        return dataclasses.replace(exam, probed=())
    ranks = exam.request["ranks_per_node"]
    has_gpus = all(exam.facts[node]["gpus"] >= ranks for node in probed)
    device = "cuda" if has_gpus and exam.request["device"] != "cpu" else "cpu"
    first_node = exam.facts[probed[0]]
    node_of_rank = ",".join(str(node) for node in probed for _ in range(ranks))
    probe_request = {
        "first_rank": {str(node): index * ranks for index, node in enumerate(probed)},
        "ranks_per_node": ranks,
        "world_size": ranks * len(probed),
        "rendezvous": (first_node["address"], first_node["probe_port"]),
        "seconds": seconds,
        "argv": ["--device", device, "--node-of-rank", node_of_rank, "--seconds", f"{seconds:.1f}"],
    }
    replies = nodes.request("probe", probe_request, deadline + _END_SECONDS / 2)
    return dataclasses.replace(
        exam, request={**exam.request, "probe_device": device}, probed=probed, ranks=_results_by_rank(replies)
    )


def _results_by_rank(replies: Mapping[int, Mapping[str, Any]]) -> dict[int, Any]:
    return {int(rank): result for reply in replies.values() for rank, result in reply.items() if rank.isdigit()}
