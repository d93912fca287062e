"""Requests to nodes, and the connections of other machines."""

import os
import socket
import sys
import threading
import time

from support.processes import REPOSITORY, free_port

from launch.doctor.nodes import Nodes, accept_nodes, connect_to_coordinator

# Replies to every request as node 0, then ends its output after a request of kind "last".
ECHO_NODE = """
import sys
from launch.doctor.messages import Message, Unpacker, pack
unpacker = Unpacker()
for line in sys.stdin:
    request = unpacker.feed(line)
    if request is not None and request.kind == "last":
        sys.exit(0)
    if request is not None:
        print(pack(Message(0, request.kind, {"echo": request.value})), end="", flush=True)
"""


def test_silent_node_is_waited_for_once() -> None:
    nodes = Nodes([0, 1])
    nodes.start([sys.executable, "-c", ECHO_NODE], os.environ | {"PYTHONPATH": str(REPOSITORY)})
    try:
        replies = nodes.request("facts", "a" * 3000, time.monotonic() + 5)
        assert set(replies) == {0} and replies[0]["echo"] == "a" * 3000
        assert abs(replies[0]["received_at"] - time.time()) < 60
        began = time.monotonic()
        assert set(nodes.request("reach", 1, began + 60)) == {0} and time.monotonic() - began < 30
        assert nodes.request("last", 1, time.monotonic() + 60) == {}
    finally:
        nodes.close()


def test_coordinator_accepts_only_the_token_of_its_own_start() -> None:
    ports = [free_port()]
    accepted: list[socket.socket] = []
    deadline = time.monotonic() + 20
    coordinator = threading.Thread(
        target=lambda: accepted.extend(accept_nodes("127.0.0.1", ports, "token", 1, deadline))
    )
    coordinator.start()
    problem = connect_to_coordinator("127.0.0.1", ports, "other", time.monotonic() + 1)
    connection = connect_to_coordinator("127.0.0.1", ports, "token", deadline)
    coordinator.join()
    assert isinstance(problem, str) and isinstance(connection, socket.socket) and len(accepted) == 1
    for end in (connection, *accepted):
        end.close()


def test_connection_without_coordinator_returns_the_reason() -> None:
    assert connect_to_coordinator("127.0.0.1", [free_port()], "token", time.monotonic() + 0.3) == "Connection refused"
