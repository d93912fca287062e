"""What srun starts on each node: torchrun for this node's ranks, over the network that the nodes share.

SLURM signals this process alone, and more than once; the ranks get one signal and the time to save.
"""

import argparse
import os
import socket

from launch.hardware import this_machine
from launch.torchrun import config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="of this node")
    parser.add_argument("--endpoint", required=True, metavar="HOST:PORT", help="where the nodes meet")
    parser.add_argument("--second", metavar="HOST", help="the second node")
    parser.add_argument("--id", required=True, help="of the job")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """This node's ranks, to their end; the exit code of torchrun."""
    from launch.signals import SignalForwarder  # late: psutil

    relay = SignalForwarder()
    machine = this_machine()
    script = [machine.trainer, *config_arguments(arguments.config), *overrides]
    environment = dict(os.environ)
    if arguments.nodes * arguments.ranks == 1:
        return relay.run([machine.python, *script], environment)
    argv = [machine.python, "-m", "torch.distributed.run", f"--nproc-per-node={arguments.ranks}"]
    if arguments.nodes == 1:
        return relay.run([*argv, "--standalone", *script], environment)
    is_host = os.environ.get("SLURM_NODEID") == "0"
    # A machine's own name often means loopback: the first node asks for the way to the second.
    address = own_address(arguments.second if is_host else arguments.endpoint.rpartition(":")[0])
    argv += [f"--nnodes={arguments.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={arguments.endpoint}"]
    argv += [f"--rdzv-id={arguments.id}", f"--rdzv-conf=is_host={is_host}", f"--local-addr={address}"]
    return relay.run([*argv, *script], interfaces(address) | environment)


def own_address(other: str) -> str:
    """The address from which this node reaches another one: that of the network that the nodes share."""
    with socket.socket(socket.AF_INET6 if ":" in other else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # nothing is sent
        address: str = probe.getsockname()[0]
    return address


def interfaces(address: str) -> dict[str, str]:
    """What makes gloo and NCCL use the interface of an address, not the one that the host's name happens to mean.

    A variable that the user has set wins.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}
