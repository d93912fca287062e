"""Runs the sweep of docs/tracking.md with W&B's own `wandb sweep` and `wandb agent`, against a local server."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.local_wandb import MISSING, WANDB, Server
from support.processes import REPOSITORY

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def wandb(*arguments: str) -> str:
    """Runs a command of W&B, with the samecurve of this checkout on the path, and returns its output."""
    binaries = Path("bin").resolve()
    binaries.mkdir(exist_ok=True)
    script = binaries / "samecurve"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {REPOSITORY / "launch" / "main.py"} "$@"\n')
    script.chmod(0o755)
    env = os.environ | {"PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run([WANDB, *arguments], env=env, timeout=120, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_sweep_of_the_documentation_trains_a_run_for_each_trial(server: Server) -> None:
    text = (REPOSITORY / "docs" / "tracking.md").read_text()
    (documented,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    config = yaml.safe_load(documented)
    config["command"] += ["log.figures=false", "train.max_steps=3", "train.threads_per_rank=1", "log.tensorboard=false"]
    config["parameters"] = {"optim.lr": {"values": [0.02, 0.05]}, "optim.nesterov": {"values": [True]}}
    Path("sweep.yaml").write_text(yaml.safe_dump(config))
    wandb("sweep", "--project", "mine", "sweep.yaml")
    output = wandb("agent", "local/mine/sweep1")
    assert "Traceback" not in output, output
    runs = server.request("/_/runs")
    for trial, lr in (("trial0", 0.02), ("trial1", 0.05)):
        folder = Path("runs/digits-sweep-sweep1") / trial
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        assert settings["optim"]["lr"] == lr and settings["optim"]["nesterov"] is True
        assert (folder / "wandb" / "run-id").read_text() == trial
        (run,) = [run for name, run in runs.items() if name.endswith(f"mine/{trial}")]
        assert run["complete"] and run["exitcode"] == 0 and run["history"]
    assert len(runs) == 2
