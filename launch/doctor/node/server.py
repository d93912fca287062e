"""What the doctor runs on each node: it is asked by lines, it answers by lines, and it leaves nothing running.

Asked in this order: `facts`, then `reach` with the addresses of all, then `probe` with the ranks to start; the end of
the input is the end.
"""

import os
import signal
import socket
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

SHARED_SECONDS = 5.0  # a network file system shows another node's file that much later
_WORDS_KEPT = 300


def serve(reader: IO[str], writer: IO[str], node: int) -> int:
    """node: place of this one, from 0. Ends with the input, or by SIGALRM when its time is over."""
    unpacker = Unpacker()
    listener: reach.Listener | None = None

    def log(kind: str, value: Any) -> None:
        writer.write(pack(Message(node, kind, value)))
        writer.flush()

    for line in reader:
        asked = unpacker.feed(line)
        if asked is None:
            continue
        if asked.kind == "facts":
            signal.alarm(int(asked.value["seconds"]) + 10)
            address, unknown = reach.own_address(asked.value["head"])
            listener = _listen(node, address)
            place = {"address": address, "port": listener.port if listener else 0, "probe_port": _free_port(address)}
            log("facts", place | {"head_problem": unknown} | _link(address) | facts.collect(asked.value))
        elif asked.kind == "reach":
            others = {
                int(key): (where[0], where[1]) for key, where in asked.value["places"].items() if int(key) != node
            }
            log("reach", {"unreachable": reach.unreachable(others), "shared": _answer(asked.value["shared"], node)})
        elif asked.kind == "probe":
            log("probe", _probe(asked.value, node))
    return 0


def _listen(node: int, address: str) -> reach.Listener | None:
    try:
        return reach.Listener(node, address) if address else None
    except OSError:
        return None


def _link(address: str) -> dict[str, Any]:
    """The interface with that address and its speed in Mbit/s; None: unknown, or not a real one's."""
    name = reach.interface_of(address)
    folder = Path("/sys/class/net") / name
    speed = None
    if name and (folder / "device").exists():  # a bridge's or a veth's number means nothing
        try:
            speed = int((folder / "speed").read_text())
        except (OSError, ValueError):
            speed = None
    return {"interface": name, "link_mbit": speed if speed and speed > 0 else None}


def _free_port(address: str) -> int:
    """For the ranks to meet at, should this be their first node."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
    return port


def _answer(shared: Mapping[str, str], node: int) -> str:
    """Leaves in the shared folder what it reads there; why that is not possible, or nothing."""
    folder = Path(shared["folder"])
    until = time.monotonic() + SHARED_SECONDS
    while True:
        try:
            word = (folder / "asked").read_text()
            break
        except OSError as error:
            if time.monotonic() > until:
                return f"{folder.parent}: the first node's file is not seen here ({error.strerror})"
            time.sleep(0.1)
    if word != shared["word"]:
        return f"{folder.parent}: the first node's file has another text here"
    try:
        (folder / f"answer-{node}").write_text(word)
    except OSError as error:
        return f"{folder.parent}: {error.strerror}"
    return ""


def _probe(asked: Mapping[str, Any], node: int) -> dict[str, Any]:
    """Starts probe.py once for each rank of this node: what each rank printed and how it ended, by rank."""
    first = asked["first_rank"].get(str(node))
    if first is None:
        return {}
    until = time.monotonic() + asked["seconds"]
    found: dict[str, Any] = {}
    threads = []
    for local_rank in range(asked["ranks_per_node"]):
        process = subprocess.Popen(
            [sys.executable, str(INSTALL_ROOT / "launch" / "doctor" / "node" / "probe.py"), *asked["argv"]],
            env=_environment(asked, first + local_rank, local_rank),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        thread = threading.Thread(target=_wait, args=(process, until, found, str(first + local_rank)))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return found


def _wait(process: "subprocess.Popen[str]", until: float, found: dict[str, Any], rank: str) -> None:
    """A rank that hangs is killed at the end of its time; what it has said so far counts."""
    late = False
    try:
        out, error = process.communicate(timeout=max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        late = True
        process.kill()
        out, error = process.communicate()
    words = [line for line in error.splitlines() if line.strip()]
    last = words[-1][-_WORDS_KEPT:] if words and process.returncode else ""
    found[rank] = {"out": out, "code": process.returncode, "late": late, "last_words": last}


def _environment(asked: Mapping[str, Any], rank: int, local_rank: int) -> dict[str, str]:
    """A rank's place. The job step's own variables would tell it of another number of processes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    address, port = asked["meet"]
    interface = reach.interface_of(reach.own_address(address)[0])
    if interface:  # the one that training will use
        kept = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} | kept
    ranks = asked["ranks_per_node"]
    return kept | {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "WORLD_SIZE": str(asked["world_size"]),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
    }
