"""The nodes that are looked at: all are asked the same, and answer in a limited time or not at all.

A node is a process at the other end of a pipe (this machine; srun, whose pipe leads to a task on each node) or of a
connection (torchrun's processes of other machines).
"""

import contextlib
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from launch.doctor.messages import Message, Unpacker, pack

_END_SECONDS = 5.0
_CALL_AGAIN_SECONDS = 0.2
_PORTS_TRIED = 8


class Nodes:
    def __init__(self, expected: Sequence[int]) -> None:
        """expected: the places of the nodes that should answer."""
        self._expected = set(expected)
        self._writers: list[IO[str]] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._heard: queue.SimpleQueue[tuple[float, Message | None]] = queue.SimpleQueue()
        self._open = 0

    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """A process that serves one node, or srun that starts one on each."""
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._processes.append(process)
        assert process.stdin and process.stdout
        self._add(process.stdout, process.stdin)

    def connect(self, connection: socket.socket) -> None:
        """A node that has called."""
        self._add(connection.makefile("r"), connection.makefile("w"))

    def _add(self, reader: IO[str], writer: IO[str]) -> None:
        self._writers.append(writer)
        self._open += 1
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def _listen(self, reader: IO[str]) -> None:
        unpacker = Unpacker()
        with contextlib.suppress(OSError, ValueError):  # it has left, or the doctor has
            for line in reader:
                heard = unpacker.feed(line)
                if heard is not None:
                    self._heard.put((time.time(), heard))
        self._heard.put((time.time(), None))

    def ask(self, kind: str, value: Any, until: float) -> dict[int, Any]:
        """Asks all and waits for each, at most until that time (monotonic seconds): answers by node, with the time
        (since 1970) at which each came as `heard_at`. Who is silent is missing, and is not waited for again."""
        for writer in self._writers:
            with contextlib.suppress(OSError, ValueError):  # that node has left
                writer.write(pack(Message(-1, kind, value)))
                writer.flush()
        answers: dict[int, Any] = {}
        while self._expected - set(answers) and self._open and time.monotonic() < until:
            try:
                heard_at, heard = self._heard.get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                break
            if heard is None:
                self._open -= 1
            elif heard.kind == kind:
                answers[heard.node] = heard.value | {"heard_at": heard_at}
        self._expected &= set(answers)
        return dict(sorted(answers.items()))

    def close(self) -> None:
        """The end of their input ends the nodes; a process that does not end is killed."""
        for writer in self._writers:
            with contextlib.suppress(OSError, ValueError):
                writer.close()
        for process in self._processes:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def callers(address: str, ports: Sequence[int], word: str, wanted: int, until: float) -> list[socket.socket]:
    """The first node's side under torchrun: the connections of as many other nodes as come in time."""
    found: list[socket.socket] = []
    with _listener(address, ports) as listener:
        while len(found) < wanted and time.monotonic() < until:
            listener.settimeout(max(0.01, until - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                break
            connection.settimeout(None)
            if _heard_word(connection, word):
                found.append(connection)
            else:
                connection.close()
    return found


def call(address: str, ports: Sequence[int], word: str, until: float) -> socket.socket | str:
    """The other nodes' side: a connection to the first one, or why there is none."""
    problem = "no time left"
    while time.monotonic() < until:
        for port in ports[:_PORTS_TRIED]:
            try:
                connection = socket.create_connection((address, port), timeout=max(0.1, until - time.monotonic()))
                connection.sendall(f"{word}\n".encode())
                if connection.recv(3) == b"ok\n":
                    connection.settimeout(None)
                    return connection
                connection.close()
            except OSError as error:
                problem = error.strerror or str(error)
        time.sleep(_CALL_AGAIN_SECONDS)
    return problem


def _listener(address: str, ports: Sequence[int]) -> socket.socket:
    """At the first of the ports that is free; the others try them all. Raises OSError."""
    for port in ports[:_PORTS_TRIED]:
        with contextlib.suppress(OSError):
            return socket.create_server((address, port))
    raise OSError(f"none of the ports {ports[0]} to {ports[_PORTS_TRIED - 1]} is free on {address}")


def _heard_word(connection: socket.socket, word: str) -> bool:
    """Whether the caller is a node of this run; it is told so."""
    try:
        connection.settimeout(2.0)
        heard = connection.recv(256) == f"{word}\n".encode()
        if heard:
            connection.sendall(b"ok\n")
        connection.settimeout(None)
    except OSError:
        return False
    return heard
