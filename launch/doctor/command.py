"""`samecurve doctor`: what will go wrong on this machine, in this job, or among torchrun's ranks; in under a minute.

Measures (launch/doctor/node.py on each node, trainer/probe.py as each rank), then judges (launch/doctor/diagnosis.py).
"""

import argparse
import os
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.hardware import INSTALL_ROOT, Machine, this_machine
from trainer.errors import ConfigError, WorldError

_MAIN = str(INSTALL_ROOT / "launch" / "main.py")
_FACTS_PART, _REACH_SECONDS, _END_SECONDS = 0.5, 15.0, 4.0
_LEAST_SECONDS = 5.0
_WANDB_SERVER = "https://api.wandb.ai"
_WORD_BYTES = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="processes on each node; default: one a GPU, or one on the CPU")
    add("--nodes", type=int, metavar="N", help="outside of a job: look at so many nodes of the SLURM cluster")
    add("--gpus-per-node", type=int, metavar="G", help="GPUs that each node should have")
    add("--partition", metavar="P", help="of the SLURM cluster")
    add("--short", action="store_true", help="facts and reachability only: no matrix products, no all-reduce")
    add("--json", action="store_true", help="one JSON object instead of a text")
    add("--timeout-seconds", type=float, default=60.0, metavar="S", help="at most for all of it; default: 60")
    add("--as-node", type=int, metavar="PLACE", help=argparse.SUPPRESS)


@dataclass(frozen=True, slots=True)
class Scene:
    """Where the doctor was called, and who is to be looked at."""

    names: tuple[str, ...]
    head: str
    """name or address of the first node"""
    ranks_per_node: int
    gpus_per_node: int
    commands: tuple[tuple[str, ...], ...]
    """what serves the nodes from here"""
    meeting: Any = None
    """under torchrun: its place, where the other nodes' processes call"""


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """0: nothing would fail; 1: something would, named with its node; raises UserError for a wrong use."""
    if arguments.as_node is not None:
        from launch.doctor.node import server

        return server.serve(sys.stdin, sys.stdout, _place(arguments.as_node))
    if arguments.timeout_seconds < _LEAST_SECONDS:
        raise ConfigError(f"--timeout-seconds {arguments.timeout_seconds:g}: wanted {_LEAST_SECONDS:g} or more")
    for option, value in (("--ranks", arguments.ranks), ("--nodes", arguments.nodes)):
        if value is not None and value < 1:
            raise WorldError(f"{option} {value}: wanted 1 or more")
    if "RANK" in os.environ:
        from launch.doctor import torchrun

        if not torchrun.is_first():
            return torchrun.serve(arguments.timeout_seconds)
    elif "SLURM_JOB_ID" not in os.environ and (arguments.nodes or arguments.partition):
        from launch.doctor import job

        return job.submit(arguments, overrides)
    from launch import forecast  # late: 0.1 s

    return _look_and_tell(arguments, forecast.load_settings(arguments.config, overrides))


def _place(given: int) -> int:
    """-1: srun says it to each of its tasks."""
    return given if given >= 0 else int(os.environ["SLURM_PROCID"])


def _look_and_tell(arguments: argparse.Namespace, config: Any) -> int:
    from launch.doctor.judge import diagnosis, findings

    begin = time.monotonic()
    scene = _scene(arguments, config, this_machine())
    asked = _asked(arguments, config, scene)
    exam = _examine(scene, asked, arguments, begin + arguments.timeout_seconds)
    found, names = diagnosis.judge(exam), [exam.name(node) for node in exam.places]
    seconds = time.monotonic() - begin
    if arguments.json:
        about = {"nodes": names, "ranks_per_node": scene.ranks_per_node, "seconds": round(seconds, 1)}
        print(findings.to_json(found, about), flush=True)
    else:
        nodes = f"{len(names)} nodes ({', '.join(names)})" if len(names) > 1 else names[0]
        ranks = f"{scene.ranks_per_node} rank{'s' if scene.ranks_per_node > 1 else ''} each"
        print(findings.to_text(found, f"samecurve doctor: {nodes}, {ranks}, {seconds:.1f} s"), flush=True)
    return int(findings.failed(found))


def _scene(arguments: argparse.Namespace, config: Any, machine: Machine) -> Scene:
    """Raises UserError when a job's nodes differ, or are not those that were asked for."""
    device = config.train.device
    gpus = arguments.gpus_per_node
    if "RANK" in os.environ:
        from launch.doctor import torchrun

        meeting = torchrun.meeting()
        ranks = meeting.ranks_per_node
        names = tuple(f"node {place}" for place in range(meeting.nodes))
        on_gpu = device == "cuda" or (device == "auto" and machine.gpus > 0)
        gpus = (ranks if on_gpu else 0) if gpus is None else gpus
        return Scene(names, meeting.address, ranks, gpus, (_server(machine, 0),), meeting)
    if "SLURM_JOB_ID" in os.environ:
        from launch.doctor import job
        from launch.slurm import batch, client

        given = client.allocation()
        if arguments.nodes and arguments.nodes != len(given.nodes):
            raise WorldError(f"--nodes {arguments.nodes}, but this job has {len(given.nodes)}; leave the option away")
        gpus = given.gpus_per_node if gpus is None else gpus
        srun = job.srun(given, _server(machine, -1))
        ranks = arguments.ranks or given.ranks_per_node
        return Scene(given.nodes, batch.node_address(given.nodes[0]), ranks, gpus, (srun,))
    on_gpu = machine.gpus > 0 and device != "cpu"
    ranks = arguments.ranks or gpus or (machine.gpus if on_gpu else 1)
    gpus = (ranks if on_gpu or device == "cuda" else 0) if gpus is None else gpus
    return Scene((os.uname().nodename,), "127.0.0.1", ranks, gpus, (_server(machine, 0),))


def _server(machine: Machine, place: int) -> tuple[str, ...]:
    return (machine.python, _MAIN, "doctor", "--as-node", str(place))


def _asked(arguments: argparse.Namespace, config: Any, scene: Scene) -> dict[str, Any]:
    """What the run needs, with absolute paths: a node may start in another folder."""
    from trainer.config.validate import check_ranks

    try:
        check_ranks(config, len(scene.names) * scene.ranks_per_node)
        problem = ""
    except WorldError as error:
        problem = str(error)
    root = Path(config.run.root).expanduser().absolute()
    speaks = config.log.wandb in ("auto", "online") and os.environ.get("WANDB_MODE") not in ("offline", "disabled")
    data = {"name": config.data.name, "root": str(Path(config.data.root).expanduser().absolute())}
    return {
        "head": scene.head,
        "seconds": arguments.timeout_seconds,
        "ranks_per_node": scene.ranks_per_node,
        "gpus_per_node": scene.gpus_per_node,
        "device": config.train.device,
        "run_root": str(root),
        "run_folder": str(root / config.run.name),
        "data": data | {"download": config.data.download},
        "workers": config.data.workers,
        "wandb": config.log.wandb,
        "wandb_server": os.environ.get("WANDB_BASE_URL", _WANDB_SERVER) if speaks else "",
        "settings": problem,
    }


def _examine(scene: Scene, asked: dict[str, Any], arguments: argparse.Namespace, until: float) -> Any:
    """Asks all nodes, in a limited time. Nothing of it is left on any node, nor in the run folder."""
    from launch.doctor import job
    from launch.doctor.examination import Examination
    from launch.doctor.nodes import Nodes

    nodes = Nodes(range(len(scene.names)))
    token = Token(Path(asked["run_root"]))
    try:
        for command in scene.commands:
            nodes.start(command, job.environment())
        if scene.meeting is not None:
            scene.meeting.gather(nodes, time.monotonic() + _FACTS_PART * arguments.timeout_seconds / 2)
        facts = nodes.ask("facts", asked, until - (1 - _FACTS_PART) * arguments.timeout_seconds)
        places = {node: (found["address"], found["port"]) for node, found in facts.items()}
        question = {"places": places, "shared": {"folder": str(token.folder), "word": token.word}}
        reach = nodes.ask("reach", question, min(until, time.monotonic() + _REACH_SECONDS))
        exam = Examination(scene.names, asked, facts, reach, token.answers(reach), token.problem)
        return exam if arguments.short else _measure(nodes, exam, until - _END_SECONDS)
    finally:
        token.remove()
        nodes.close()


def _measure(nodes: Any, exam: Any, until: float) -> Any:
    """The speeds of the ranks of all nodes that reach each other."""
    from dataclasses import replace

    probed = exam.reached()
    seconds = until - time.monotonic()
    if not probed or seconds < _LEAST_SECONDS:
        return replace(exam, probed=())
    ranks = exam.asked["ranks_per_node"]
    has_gpus = all(exam.facts[node]["gpus"] >= ranks for node in probed)
    device = "cuda" if has_gpus and exam.asked["device"] != "cpu" else "cpu"
    first = exam.facts[probed[0]]
    node_of = ",".join(str(node) for node in probed for _ in range(ranks))
    question = {
        "first_rank": {str(node): place * ranks for place, node in enumerate(probed)},
        "ranks_per_node": ranks,
        "world_size": ranks * len(probed),
        "meet": (first["address"], first["probe_port"]),
        "seconds": seconds,
        "argv": ["--device", device, "--node-of", node_of, "--seconds", f"{seconds:.1f}"],
    }
    answers = nodes.ask("probe", question, until + _END_SECONDS / 2)
    said = {int(rank): found for answer in answers.values() for rank, found in answer.items() if rank.isdigit()}
    return replace(exam, asked=exam.asked | {"probe_device": device}, probed=probed, ranks=said)


class Token:
    """A file in run.root that every node must see, and the answers they leave beside it."""

    def __init__(self, root: Path) -> None:
        self.word = secrets.token_hex(_WORD_BYTES)
        self.folder = root / f".doctor-{self.word}"
        self.problem = ""
        self._made = [place for place in (self.folder, root, *root.parents) if not place.exists()]
        try:
            self.folder.mkdir(parents=True)
            (self.folder / "asked").write_text(self.word)
        except OSError as error:
            self.problem = f"{root}: {error.strerror}"

    def answers(self, reach: dict[int, Any]) -> frozenset[int]:
        """The nodes whose answer is seen here; one that says it left one has the time a network file system takes."""
        from launch.doctor.node.server import SHARED_SECONDS

        until = time.monotonic() + SHARED_SECONDS
        left = {node for node, found in reach.items() if not found["shared"]}
        seen: set[int] = set()
        while left - seen:
            seen |= {node for node in left if self._holds(self.folder / f"answer-{node}")}
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        return frozenset(seen)

    def _holds(self, path: Path) -> bool:
        try:
            return path.read_text() == self.word
        except OSError:
            return False

    def remove(self) -> None:
        """With the folders that it was made in."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for place in self._made[1:]:
            try:
                place.rmdir()
            except OSError:  # somebody has begun to use it
                return
