"""The other nodes' addresses in, which of them answer out. A plain TCP connection each, as gloo and NCCL make them."""

import fcntl
import ipaddress
import socket
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

_CONNECT_SECONDS = 3.0
_GREETING_BYTES = 64
_SIOCGIFADDR = 0x8915
_MOST_AT_ONCE = 64


class Listener:
    """Answers whoever connects with this node's number, so that nobody takes a stranger for it."""

    def __init__(self, node: int, address: str) -> None:
        """Raises OSError when the address is not this machine's."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family)
        self._socket.bind((address, 0))  # the system picks a port that is free
        self._socket.listen(128)
        self.port: int = self._socket.getsockname()[1]
        self._greeting = f"samecurve {node}\n".encode()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:  # closed
                return
            with caller:
                try:
                    caller.sendall(self._greeting)
                except OSError:  # it has left
                    continue


def own_address(head: str) -> tuple[str, str]:
    """The address from which this node reaches the first one, and what was wrong on the way, or nothing.

    Ranks meet over the network that leads to the first node. The address is empty when there is none.
    """
    try:
        kind, _, _, _, place = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        return "", f"the name {head} is not known here ({error.strerror})"
    try:
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # nothing is sent
            return probe.getsockname()[0], ""
    except OSError as error:
        return "", f"no route to {head} at {place[0]} ({error.strerror})"


def interface_of(address: str) -> str:
    """The network interface with that IPv4 address; empty when there is none."""
    if ":" in address or not address:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # without an address
                continue
            if ipaddress.IPv4Address(found[20:24]) == ipaddress.ip_address(address):
                return name
    return ""


def unreachable(others: Mapping[int, tuple[str, int]]) -> dict[int, str]:
    """node: (address, port) of the others' listeners in; those that do not answer, each with the reason."""
    if not others:
        return {}
    with ThreadPoolExecutor(min(len(others), _MOST_AT_ONCE)) as pool:
        found = pool.map(lambda node: (node, _problem(node, *others[node])), others)
        return {node: problem for node, problem in found if problem}


def _problem(node: int, address: str, port: int) -> str:
    if not address:
        return "it has no address on the network of the first node"
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_SECONDS) as connection:
            heard = connection.recv(_GREETING_BYTES)
    except OSError as error:
        return f"{address}: {error.strerror or error}"
    if heard != f"samecurve {node}\n".encode():
        return f"{address}: another program answers there"
    return ""


def can_connect(host: str, port: int) -> str:
    """Why a server cannot be reached within seconds; empty when it can. Nothing is sent."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
