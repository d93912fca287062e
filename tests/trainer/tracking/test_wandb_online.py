"""W&B online: the real client against a local server, which these tests need and otherwise skip."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.local_wandb import Server
from support.processes import MAIN, Done, Ranks

SETTINGS = ["--config", "digits", "log.tensorboard=false", "train.max_steps=40"]
RUN = [sys.executable, MAIN, *SETTINGS]


def test_auto_goes_online_with_a_key_and_a_network(ranks: Ranks, server: Server) -> None:
    assert "W&B: online, http" in ranks.run(1, *SETTINGS, plant="")
    (run,) = server.ask("/_/runs").values()
    rows = [json.loads(line) for line in Path("runs/digits/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in run["history"]] == [row["step"] for row in rows] == [20, 23, 40, 40]
    assert (
        run["history"][0]["train/loss"] == rows[0]["loss"] and run["summary"]["test/accuracy"] == rows[-1]["accuracy"]
    )
    assert run["complete"] and run["exitcode"] == 0


@pytest.mark.slow
def test_a_server_that_fails_at_the_start_is_offline(launch: Callable[..., Done], server: Server) -> None:
    server.ask("/_/fault", {"op": "UpsertBucket", "status": 500})
    done = launch(RUN)
    assert done.code == 0 and "W&B: offline (Timed out" in done.out and "wandb sync" in done.out, done.err


@pytest.mark.slow
def test_a_server_that_fails_at_the_end_does_not_hold_the_run(launch: Callable[..., Done], server: Server) -> None:
    server.ask("/_/fault", {"match": "file_stream", "status": 500})
    done = launch(RUN)
    assert done.code == 0 and "W&B: not all was uploaded within" in done.out, done.err
