"""Messages between the coordinator and the nodes."""

from launch.doctor.messages import Message, Unpacker, pack


def message_lines(node: int) -> list[str]:
    return pack(Message(node, "facts", {"long": "x" * 2000, "node": node})).splitlines()


def test_mixed_lines_of_several_nodes_are_assembled() -> None:
    lines = [message_lines(node) for node in range(2)]
    assert all(len(line) < 1000 for node in lines for line in node)
    unpacker = Unpacker()
    mixed = [line for pair in zip(*lines, strict=True) for line in (pair[0], "output of a site's script", pair[1])]
    messages = [unpacker.feed(line) for line in mixed]
    assert [message.value["node"] for message in messages if message is not None] == [0, 1]


def test_message_with_a_lost_line_is_dropped_and_the_next_one_is_read() -> None:
    lines, unpacker = message_lines(0), Unpacker()
    assert unpacker.feed(lines[0]) is None and unpacker.feed(lines[2]) is None
    assert unpacker.feed(lines[2]) is None
    messages = [unpacker.feed(line) for line in lines]
    assert messages[-1] == Message(0, "facts", {"long": "x" * 2000, "node": 0})
