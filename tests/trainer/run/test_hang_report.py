"""The hang report names the late ranks. test_watchdog.py tests it with real ranks."""

import os
import socket
import threading

import pytest

from trainer.run.hang_report import RankState, describe_late_ranks, format_report, format_stacks, process_state

HERE = socket.gethostname()


def state(
    rank: int, step: int, phase: str, stacks: str = "a stack\n", host: str = "another", pid: int = 7
) -> RankState:
    return RankState(rank, host, pid, step, phase, stacks)


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ([state(0, 5, "backward pass"), state(1, 5, "forward pass")], "rank 1, in step 5, forward pass"),
        ([state(0, 5, "forward pass"), state(1, 4, "result")], "rank 1, in step 4, result"),
        ([state(0, 5, "result"), state(1, 5, "result")], "none; all are in step 5, result"),
        (
            [state(0, 5, "result"), state(1, 5, "checkpoint", stacks="")],
            "rank 1, which does not answer (look at process 7 on another)",
        ),
        (
            [state(0, 5, "result"), state(1, 5, "checkpoint", stacks=""), state(2, -1, "start")],
            "rank 1, which does not answer (look at process 7 on another) and rank 2, without a heartbeat",
        ),
    ],
)
def test_ranks_that_are_silent_or_behind_are_late(states: list[RankState], text: str) -> None:
    assert describe_late_ranks(states) == text


def test_report_has_a_section_for_each_rank() -> None:
    text = format_report("a hang", 60.0, [state(0, 5, "result"), state(1, -1, "start", stacks="")])
    assert text.splitlines() == [
        "a hang",
        "train.hang_timeout_seconds=60",
        "",
        "== rank 0, process 7 on another: in step 5, result",
        "a stack",
        "",
        "== rank 1, process 7 on another: without a heartbeat",
        "   no answer; look at process 7 on another",
    ]


def test_silent_rank_on_this_machine_has_its_process_state() -> None:
    assert "none of its Python threads runs" in state(0, 1, "result", "", HERE, os.getpid()).why_silent()
    assert state(0, 1, "result", "", HERE, 1 << 30).why_silent().endswith("it has ended")
    assert process_state(1 << 30) == "gone"


def test_main_thread_is_the_first_stack() -> None:
    stacks: list[str] = []
    main_thread = threading.get_ident()
    thread = threading.Thread(target=lambda: stacks.append(format_stacks(main_thread)))
    thread.start()
    thread.join()
    assert stacks[0].startswith("   main thread\n") and "test_main_thread_is_the_first_stack" in stacks[0]
