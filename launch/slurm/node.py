"""Runs on each node of a SLURM job as its srun task: starts torchrun for the ranks of this node.

SLURM signals only this process, and more than once. The ranks receive one signal and have time to save.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Mapping

from launch.elastic import one_machine_options
from launch.hardware import this_machine
from launch.slurm import client, retry
from launch.torchrun import LOG_VARIABLE, config_arguments
from trainer.process.temporary import temporary_folder

_START_SECONDS = 600.0  # srun may need as long to start a task, for a container image or a slow prolog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that the batch script passes to each node."""
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="ranks on this node")
    parser.add_argument("--endpoint", required=True, metavar="HOST:PORT", help="rendezvous address on the first node")
    parser.add_argument("--second", metavar="HOST", help="address of the second node")
    parser.add_argument(
        "--controller-time",
        type=float,
        required=True,
        metavar="SECONDS",
        help="now, by the clock of SLURM's controller",
    )
    parser.add_argument("--id", required=True, help="id of the job")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the ranks of this node to their end and returns the exit code of torchrun."""
    from launch.signals import SignalForwarder  # lazy import: psutil

    forwarder = SignalForwarder()
    machine = this_machine()
    script = [machine.trainer, *config_arguments(arguments.config), *overrides]
    environment = correct_job_end(os.environ, arguments.controller_time)
    if arguments.nodes * arguments.ranks == 1:
        return forwarder.run([machine.python, *script], environment)
    argv = [machine.python, machine.elastic, f"--nproc-per-node={arguments.ranks}"]
    if arguments.nodes == 1:
        argv += one_machine_options()
    else:
        is_host = os.environ.get("SLURM_NODEID") == "0"
        # A machine's own name often resolves to loopback, so the first node looks up its route to the second one.
        address = local_address(arguments.second if is_host else arguments.endpoint.rpartition(":")[0])
        argv += [f"--nnodes={arguments.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={arguments.endpoint}"]
        argv += [f"--rdzv-id={arguments.id}", f"--rdzv-conf=is_host={is_host}", f"--local-addr={address}"]
        environment = interface_variables(address) | environment
    with temporary_folder() as folder:
        return forwarder.run([*argv, *script], {LOG_VARIABLE: str(folder / "logs")} | environment)


def correct_job_end(environment: Mapping[str, str], controller_time: float) -> dict[str, str]:
    """Returns the environment with the end of the job by the clock of this node, if that is more than a minute wrong.

    SLURM ends the job by the controller's clock, and the ranks stop in time by their own. Prints a line on the clock.
    controller_time: when srun started, by the controller's clock, in seconds since 1970. The time since then is the
    error of the clock and what srun needed to start this task, so only the controller can say which.
    """
    offset, result = time.time() - controller_time, dict(environment)
    if abs(offset) > retry.CLOCK_SKEW_SECONDS:
        measured = client.clock_offset()  # None in a container without SLURM's commands
        offset = measured if measured is not None else 0.0 if 0 < offset < _START_SECONDS else offset
    if abs(offset) > retry.CLOCK_SKEW_SECONDS:
        sentence = retry.describe_clock(environment.get("SLURMD_NODENAME") or socket.gethostname(), offset)
        print(f"samecurve: {sentence}; start chrony or ntpd there", file=sys.stderr, flush=True)
        if end := environment.get("SLURM_JOB_END_TIME", ""):
            result["SLURM_JOB_END_TIME"] = str(int(end) + round(offset))
    return result


def local_address(peer: str) -> str:
    """Returns the address of this node on the network that leads to a peer. Raises OSError without a route."""
    with socket.socket(socket.AF_INET6 if ":" in peer else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # a datagram socket sends nothing on connect
        address: str = probe.getsockname()[0]
    return address


def interface_variables(address: str) -> dict[str, str]:
    """Returns the variables that make gloo and NCCL use the network interface with an address.

    By default they use the interface that the host's name resolves to. Variables that the user sets take precedence.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}
