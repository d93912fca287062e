"""Tests which other nodes answer a plain TCP connection, the kind that gloo and NCCL open."""

import fcntl
import ipaddress
import socket
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

_CONNECT_SECONDS = 3.0
_GREETING_BYTES = 64
_BACKLOG = 128
_SIOCGIFADDR = 0x8915
_MAX_CONNECTIONS = 64


def _greeting(node: int) -> bytes:
    return f"samecurve {node}\n".encode()


class Listener:
    """Answers every connection with the number of this node, so that no other program can be taken for it."""

    def __init__(self, node: int, address: str) -> None:
        """Raises OSError when the address does not belong to this machine."""
        self._socket = socket.socket(_family(address))
        self._socket.bind((address, 0))  # the system chooses a free port
        self._socket.listen(_BACKLOG)
        self.port: int = self._socket.getsockname()[1]
        self._greeting = _greeting(node)
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # the socket is closed
                return
            with connection:
                try:
                    connection.sendall(self._greeting)
                except OSError:  # the peer has closed the connection
                    continue


def own_address(head: str) -> tuple[str, str]:
    """Returns the address from which this node reaches the first one, and an empty problem, or "" and the problem.

    Ranks meet over the network that leads to the first node.
    """
    try:
        family, _, _, _, head_address = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        return "", f"cannot resolve the name {head} ({error.strerror})"
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(head_address)  # a datagram socket sends nothing on connect
            return probe.getsockname()[0], ""
    except OSError as error:
        return "", f"no route to {head} at {head_address[0]} ({error.strerror})"


def interface_of(address: str) -> str:
    """Returns the name of the network interface with an IPv4 address; empty without one."""
    if ":" in address or not address:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # this interface has no address
                continue
            if ipaddress.IPv4Address(reply[20:24]) == ipaddress.ip_address(address):
                return name
    return ""


def unreachable(listeners: Mapping[int, tuple[str, int]]) -> dict[int, str]:
    """Connects to the (address, port) of each node's listener; returns the nodes that fail, with the reason."""
    if not listeners:
        return {}
    with ThreadPoolExecutor(min(len(listeners), _MAX_CONNECTIONS)) as pool:
        problems = pool.map(lambda node: (node, _connection_problem(node, *listeners[node])), listeners)
        return {node: problem for node, problem in problems if problem}


def _connection_problem(node: int, address: str, port: int) -> str:
    if not address:
        return "it has no address on the network of the first node"
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_SECONDS) as connection:
            reply = connection.recv(_GREETING_BYTES)
    except OSError as error:
        return f"{address}: {error.strerror or error}"
    if reply != _greeting(node):
        return f"{address}: another program answers on port {port}"
    return ""


def connection_problem(host: str, port: int) -> str:
    """Returns why a server does not accept a connection within seconds; empty when it does. Sends nothing."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def free_port(address: str) -> int:
    """Returns a free TCP port of one of this machine's addresses."""
    with socket.socket(_family(address)) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
    return port
