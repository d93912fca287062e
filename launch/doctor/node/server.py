"""Serves the doctor's requests on one node: reads messages, writes replies, and leaves no process behind.

The requests come in this order: `facts`, then `reach` with the addresses of all nodes, then `probe` with the ranks to
start. The end of the input ends the server.
"""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from launch.doctor.messages import Message, Unpacker, pack
from launch.doctor.node import facts, reach
from launch.hardware import INSTALL_ROOT
from trainer.distributed.environment import without_launchers

SHARED_SECONDS = 5.0  # a network file system may take this long to show the file of another node
_ALARM_SPARE_SECONDS = 10
_POLL_SECONDS = 0.1
_LAST_WORDS_LENGTH = 300


def serve(reader: IO[str], writer: IO[str], node: int) -> int:
    """Answers requests until the input ends, and returns exit code 0. SIGALRM ends the process after its time limit.

    node: the number of this node, from 0.
    """
    unpacker = Unpacker()
    listener: reach.Listener | None = None
    for line in reader:
        request = unpacker.feed(line)
        if request is None:
            continue
        if request.kind == "facts":
            signal.alarm(int(request.value["seconds"]) + _ALARM_SPARE_SECONDS)
            address, head_problem = reach.own_address(request.value["head"])
            listener = _start_listener(node, address)
            endpoint = {
                "address": address, "port": listener.port if listener else 0, "probe_port": reach.free_port(address),
                "head_problem": head_problem,
            }  # fmt: skip
            reply = endpoint | _network_link(address) | facts.collect(request.value, is_first=node == 0)
        elif request.kind == "reach":
            reply = _reach(request.value, node)
        elif request.kind == "probe":
            reply = _probe(request.value, node)
        else:
            continue
        writer.write(pack(Message(node, request.kind, reply)))
        writer.flush()
    return 0


def _start_listener(node: int, address: str) -> reach.Listener | None:
    try:
        return reach.Listener(node, address) if address else None
    except OSError:
        return None


def _network_link(address: str) -> dict[str, Any]:
    """Returns the interface with an address and its speed in Mbit/s; None: unknown, or a virtual interface."""
    name = reach.interface_of(address)
    folder = Path("/sys/class/net") / name
    speed = None
    if name and (folder / "device").exists():  # the speed of a bridge or a veth means nothing
        try:
            speed = int((folder / "speed").read_text())
        except (OSError, ValueError):
            speed = None
    return {"interface": name, "link_mbit": speed if speed and speed > 0 else None}


def _reach(request: Mapping[str, Any], node: int) -> dict[str, Any]:
    listeners = {
        int(number): (address, port) for number, (address, port) in request["listeners"].items() if int(number) != node
    }
    return {
        "unreachable": reach.unreachable(listeners),
        "shared_problem": _answer_token(request["shared"], node),
        "has_own_flock": _has_own_flock(Path(request["shared"]["folder"]) / "token"),
    }


def _has_own_flock(token_file: Path) -> bool:
    """Returns whether this node can lock the token file by flock, although the first node has locked it."""
    try:
        with token_file.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _answer_token(shared: Mapping[str, str], node: int) -> str:
    """Copies the token file of the shared folder to an answer file. Returns why this fails; empty when it succeeds."""
    folder = Path(shared["folder"])
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        try:
            token = (folder / "token").read_text()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                return f"{folder.parent}: this node does not see the first node's file ({error.strerror})"
            time.sleep(_POLL_SECONDS)
    if token != shared["token"]:
        return f"{folder.parent}: this node sees another file than the first node's"
    try:
        (folder / f"answer-{node}").write_text(token)
    except OSError as error:
        return f"{folder.parent}: {error.strerror}"
    return ""


def _probe(request: Mapping[str, Any], node: int) -> dict[str, Any]:
    """Runs probe.py for each rank of this node. Returns each rank's output and its end, by rank."""
    first_rank = request["first_rank"].get(str(node))
    if first_rank is None:
        return {}
    deadline = time.monotonic() + request["seconds"]
    results: dict[str, Any] = {}
    threads = []
    for local_rank in range(request["ranks_per_node"]):
        process = subprocess.Popen(
            [sys.executable, str(INSTALL_ROOT / "launch" / "doctor" / "node" / "probe.py"), *request["argv"]],
            env=_rank_environment(request, first_rank + local_rank, local_rank),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        rank = str(first_rank + local_rank)
        thread = threading.Thread(target=_wait_for_rank, args=(process, deadline, results, rank))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return results


def _wait_for_rank(process: "subprocess.Popen[str]", deadline: float, results: dict[str, Any], rank: str) -> None:
    """Waits for a rank, kills it at the deadline, and adds its result: its output so far counts even then."""
    timed_out = False
    try:
        out, error = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        timed_out = True
        process.kill()
        out, error = process.communicate()
    lines = [line for line in error.splitlines() if line.strip()]
    last_words = lines[-1][-_LAST_WORDS_LENGTH:] if lines and process.returncode else ""
    results[rank] = {"out": out, "code": process.returncode, "timed_out": timed_out, "last_words": last_words}


def _rank_environment(request: Mapping[str, Any], rank: int, local_rank: int) -> dict[str, str]:
    """Returns the environment of a rank, without variables of other launchers: they announce other world sizes."""
    inherited = without_launchers(os.environ)
    address, port = request["rendezvous"]
    interface = reach.interface_of(reach.own_address(address)[0])
    if interface:  # training uses the same one
        inherited = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} | inherited
    ranks = request["ranks_per_node"]
    return inherited | {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "WORLD_SIZE": str(request["world_size"]),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
    }
