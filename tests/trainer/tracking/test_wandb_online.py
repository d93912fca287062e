"""Tests W&B online: the real client against a local server. Skipped without that server."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.local_wandb import Server
from support.processes import MAIN, CommandResult, Ranks

SETTINGS = ["--config", "digits", "log.tensorboard=false", "train.max_steps=40"]
COMMAND = [sys.executable, MAIN, *SETTINGS]


def test_auto_mode_with_key_and_network_is_online(ranks: Ranks, server: Server) -> None:
    assert "W&B: online, http" in ranks.run(1, *SETTINGS, fault="")
    run = server.only_run()
    rows = [json.loads(line) for line in Path("runs/digits/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in run["history"]] == [row["step"] for row in rows] == [20, 23, 40, 40]
    assert run["history"][0]["train/loss"] == rows[0]["loss"]
    assert run["summary"]["test/accuracy"] == rows[-1]["accuracy"]
    assert run["complete"] and run["exitcode"] == 0


@pytest.mark.slow
def test_auto_mode_with_server_errors_at_the_start_is_offline(
    launch: Callable[..., CommandResult], server: Server
) -> None:
    server.inject_fault(op="UpsertBucket", status=500)
    result = launch(COMMAND)
    assert result.code == 0 and "W&B: offline (Timed out" in result.out and "wandb sync" in result.out, result.err


@pytest.mark.slow
def test_server_errors_during_upload_do_not_block_the_end_of_the_run(
    launch: Callable[..., CommandResult], server: Server
) -> None:
    server.inject_fault(match="file_stream", status=500)
    result = launch(COMMAND)
    assert result.code == 0 and "W&B: not all was uploaded within" in result.out, result.err
