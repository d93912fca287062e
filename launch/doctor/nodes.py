"""Sends requests to all nodes and collects their replies in a limited time.

The coordinator reaches a node through the pipe of a process (on this machine, or srun with a task on each node) or
through a connection (the processes that torchrun starts on other machines).
"""

import contextlib
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from launch.doctor.messages import COORDINATOR, Message, Unpacker, pack

_END_SECONDS = 5.0
_CONNECT_INTERVAL_SECONDS = 0.2
_HANDSHAKE_SECONDS = 2.0
_MAX_TOKEN_BYTES = 256


class Nodes:
    """The nodes of an examination, as seen by the coordinator."""

    def __init__(self, expected: Sequence[int]) -> None:
        """expected: the numbers of the nodes that should reply."""
        self._expected = set(expected)
        self._writers: list[IO[str]] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._received: queue.SimpleQueue[tuple[float, Message | None]] = queue.SimpleQueue()
        self._open_readers = 0

    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts a process that serves one node, or srun, which starts one on each node."""
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._processes.append(process)
        assert process.stdin and process.stdout
        self._add(process.stdout, process.stdin)

    def connect(self, connection: socket.socket) -> None:
        """Adds a node that connected to the coordinator."""
        self._add(connection.makefile("r"), connection.makefile("w"))

    def _add(self, reader: IO[str], writer: IO[str]) -> None:
        self._writers.append(writer)
        self._open_readers += 1
        threading.Thread(target=self._read, args=(reader,), daemon=True).start()

    def _read(self, reader: IO[str]) -> None:
        """Puts each message into the queue, and None at the end."""
        unpacker = Unpacker()
        with contextlib.suppress(OSError, ValueError), reader:  # the node ended, or its connection broke
            for line in reader:
                message = unpacker.feed(line)
                if message is not None:
                    self._received.put((time.time(), message))
        self._received.put((time.time(), None))

    def request(self, kind: str, value: Any, deadline: float) -> dict[int, Any]:
        """Sends a request to all nodes and returns their replies by node.

        Each reply also holds `received_at`, in seconds since 1970. A node without a reply by the deadline (monotonic
        seconds) is missing from the result, and later requests do not wait for it.
        """
        for writer in self._writers:
            with contextlib.suppress(OSError, ValueError):  # the node ended
                writer.write(pack(Message(COORDINATOR, kind, value)))
                writer.flush()
        replies: dict[int, Any] = {}
        while self._expected - set(replies) and self._open_readers and time.monotonic() < deadline:
            try:
                received_at, message = self._received.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                break
            if message is None:
                self._open_readers -= 1
            elif message.kind == kind:
                replies[message.node] = message.value | {"received_at": received_at}
        self._expected &= set(replies)
        return dict(sorted(replies.items()))

    def close(self) -> None:
        """Ends the nodes by closing their input, and kills a process that does not end."""
        for writer in self._writers:
            with contextlib.suppress(OSError, ValueError):
                writer.close()
        for process in self._processes:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def accept_nodes(address: str, ports: Sequence[int], token: str, count: int, deadline: float) -> list[socket.socket]:
    """Waits on the first machine for the connections of other machines; returns those that came by the deadline.

    ports: candidates for the listener; token: what a machine of the same start sends first; count: number of machines
    to wait for. Raises OSError when no port is free.
    """
    connections: list[socket.socket] = []
    with _listen(address, ports) as listener:
        while len(connections) < count and time.monotonic() < deadline:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                break
            connection.settimeout(None)
            if _accept_token(connection, token):
                connections.append(connection)
            else:
                connection.close()
    return connections


def connect_to_coordinator(address: str, ports: Sequence[int], token: str, deadline: float) -> socket.socket | str:
    """Returns a connection to the first machine, or the reason why there is none by the deadline."""
    problem = "no time left"
    while time.monotonic() < deadline:
        for port in ports:
            try:
                connection = socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic()))
                connection.sendall(f"{token}\n".encode())
                if connection.recv(3) == b"ok\n":
                    connection.settimeout(None)
                    return connection
                connection.close()
            except OSError as error:
                problem = error.strerror or str(error)
        time.sleep(_CONNECT_INTERVAL_SECONDS)
    return problem


def _listen(address: str, ports: Sequence[int]) -> socket.socket:
    """Listens on the first free port; other machines try all of them. Raises OSError."""
    for port in ports:
        with contextlib.suppress(OSError):
            return socket.create_server((address, port))
    raise OSError(f"none of the ports {ports[0]} to {ports[-1]} is free on {address}")


def _accept_token(connection: socket.socket, token: str) -> bool:
    """Confirms a connection that sends the token; returns whether it did."""
    try:
        connection.settimeout(_HANDSHAKE_SECONDS)
        is_valid = connection.recv(_MAX_TOKEN_BYTES) == f"{token}\n".encode()
        if is_valid:
            connection.sendall(b"ok\n")
        connection.settimeout(None)
    except OSError:
        return False
    return is_valid
