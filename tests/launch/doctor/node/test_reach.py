"""Connections between nodes, on this machine's loopback."""

from support.processes import free_port

from launch.doctor.node import reach


def test_unreachable_tells_listeners_from_other_programs() -> None:
    listener = reach.Listener(3, "127.0.0.1")
    listeners = {
        3: ("127.0.0.1", listener.port),
        4: ("127.0.0.1", listener.port),  # node 3 answers at the address of node 4
        5: ("127.0.0.1", free_port()),
        6: ("", 0),
    }
    problems = reach.unreachable(listeners)
    assert set(problems) == {4, 5, 6} and "another program" in problems[4] and "refused" in problems[5]
    assert "no address on the network" in problems[6] and reach.unreachable({}) == {}


def test_own_address_on_the_way_to_a_peer() -> None:
    assert reach.own_address("127.0.0.1") == ("127.0.0.1", "") and reach.interface_of("127.0.0.1") == "lo"
    address, problem = reach.own_address("no-such-host.invalid")
    assert address == "" and problem.startswith("cannot resolve the name no-such-host.invalid")
