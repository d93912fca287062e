"""samecurve dashboard: what W&B's real clients save on a server names all metrics that the runs have, and no others."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.local_wandb import Server, sync
from support.processes import REPOSITORY, SMALL, Done, Ranks, Samecurve, finished_run

from launch.dashboard import panels
from trainer.errors import FolderError
from trainer.run.wandb_record import read_wandb_record

DASHBOARD = [sys.executable, str(REPOSITORY / "launch" / "main.py"), "dashboard"]
MEDIA = {"test/classes", "test/confusion", "test/mistakes"}
RUN = ["train.max_steps=24", "log.every_steps=8", "log.report=false", "log.wandb=online"]


def test_each_metric_has_one_panel_in_the_section_of_its_kind() -> None:
    names = ["train/loss", "test/loss", "validation/tta_accuracy", "train/gpu_memory_bytes", "train/new_thing", "alone"]
    found = panels.arrange(names, {"test/confusion": "image", "test/classes": "table"})
    assert {section.title: [panel.key for panel in section.panels] for section in found} == {
        "What it learns": ["validation/tta_accuracy", "test/loss", "train/loss"],
        "How fast": ["train/gpu_memory_bytes"],
        "Classes and mistakes": ["test/classes", "test/confusion"],
        "More": ["train/new_thing", "alone"],
    }
    titles = {panel.key: panel.title for section in found for panel in section.panels}
    assert titles["train/gpu_memory_bytes"] == "GPU memory in bytes, train" and titles["alone"] == "alone"


def names_in(spec: Any) -> set[str]:
    """Every metric that a saved view names, wherever it does: on an axis, in a panel, in a column."""
    if isinstance(spec, dict):
        own = {*spec.get("metrics", []), *spec.get("mediaKeys", []), *spec.get("columnOrder", [])}
        if spec.get("name") == "pick":  # of a table's panel
            own.add(spec["inputs"]["key"]["val"])
        return own.union(*map(names_in, spec.values()))
    return set().union(*map(names_in, spec)) if isinstance(spec, list) else set()


def views(server: Server) -> list[dict[str, Any]]:
    path = server.place / "views.json"
    return json.loads(path.read_text()) if path.is_file() else []


@pytest.mark.filterwarnings("ignore")  # wandb's own, and those of wandb-workspaces
def test_panels_name_what_the_runs_have_and_a_second_call_makes_nothing_new(
    server: Server, samecurve: Samecurve, ranks: Ranks
) -> None:
    import wandb

    wandb.teardown()  # it reads its variables once a process
    ranks.run(1, *SMALL, "run.name=x", *RUN, plant="")
    online = Path("runs/x")
    log_media((online / "wandb" / "run-id").read_text())
    finished_run(Path("runs"), *RUN, "run.name=group/lr=0.02", "log.wandb=offline", "data.validation_fraction=0.1")
    offline = Path("runs/group/lr=0.02")
    _, told = samecurve("dashboard", "group", code=2)
    assert "W&B has none of these runs in local/samecurve; upload them: wandb sync" in told and not views(server)
    sync(server, *(offline / "wandb").glob("offline-run-*"))

    shown, told = samecurve("dashboard")
    workspace, report = shown.splitlines()
    assert not told and workspace.startswith(f"workspace: {server.url}/local/samecurve?nw=")
    assert report.startswith(f"report: {server.url}/local/samecurve/reports/samecurve--")
    own = {"step", "_step", "_runtime", "_timestamp"}
    history = {key for run in server.ask("/_/runs").values() for row in run["history"] for key in row} - own
    assert {"validation/loss", "train/lr", "test/accuracy", *MEDIA} <= history
    saved = views(server)
    assert [view["type"] for view in saved] == ["project-view", "runs"]
    for view in saved:
        named = names_in(json.loads(view["spec"]))
        assert {name for name in named if ":" not in name} == history
        columns = {name.partition(":")[2] for name in named if name.startswith("summary:")}
        assert "test/accuracy" in columns and columns <= history
        assert '"xAxis": "step"' in json.dumps(json.loads(view["spec"]))

    assert samecurve("dashboard")[0] == shown
    assert [view["id"] for view in views(server)] == [view["id"] for view in saved] * 2

    shown, _ = samecurve("dashboard", "group/lr=0.02", "--only", "report")
    assert shown.startswith("report: ") and "samecurve:-group-lr-0.02--" in shown
    assert (offline / "wandb" / "run-id").read_text() in views(server)[-1]["spec"]
    assert (online / "wandb" / "run-id").read_text() not in views(server)[-1]["spec"]

    (Path("runs") / "silent").mkdir()
    (Path("runs") / "silent" / "config.yaml").touch()
    _, told = samecurve("dashboard", "silent", code=2)
    assert "runs/silent was not logged to W&B" in told


def log_media(run_id: str) -> None:
    """A table and images, in a run that is there."""
    script = (
        "import sys, numpy, wandb\n"
        "run = wandb.init(project='samecurve', id=sys.argv[1], resume='must')\n"
        "black = wandb.Image(numpy.zeros((4, 4, 3), numpy.uint8))\n"
        "table = wandb.Table(columns=['a'], data=[[1]])\n"
        "run.log({'test/classes': table, 'test/confusion': black, 'test/mistakes': [black, black]})\n"
        "run.finish()\n"
    )
    subprocess.run([sys.executable, "-c", script, run_id], check=True, timeout=150, capture_output=True)


@pytest.mark.parametrize("what", ["no key", "no network", "key refused", "no package"])
def test_what_is_missing_is_told_in_one_line_and_soon(what: str, launch: Callable[..., Done], server: Server) -> None:
    folder = Path("runs/x")
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "run-id").write_text("abcd1234")
    (folder / "config.yaml").write_text("run: {name: x}\nlog: {project: p}\n")
    env, wanted = {
        "no key": ({"WANDB_API_KEY": ""}, "no API key: set WANDB_API_KEY or run `wandb login`"),
        "no network": ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, "no connection to http://127.0.0.1:9"),
        "key refused": ({}, "check the key, --entity, --project and the network"),
        "no package": ({"PYTHONPATH": "without"}, "pip install 'samecurve[dashboard]'"),
    }[what]
    server.fault(match="graphql", status=401)
    Path("without").mkdir()
    Path("without/wandb_workspaces.py").write_text("raise ModuleNotFoundError(name='wandb_workspaces')\n")
    began = time.monotonic()
    done = launch(DASHBOARD, **env)
    assert time.monotonic() - began < 60  # 5, and the imports of a busy machine; W&B by itself tries for minutes
    (line,) = done.err.splitlines()
    assert done.code == 2 and line.startswith("samecurve: ") and wanted in line


def test_a_run_folder_is_read_as_it_is(tmp_path: Path) -> None:
    assert read_wandb_record(tmp_path) is None
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    (tmp_path / "wandb" / "offline-run-2").mkdir()
    (tmp_path / "wandb" / "offline-run-1" / "run-abc.wandb.synced").touch()
    (tmp_path / "wandb" / "run-id").write_text("abc\n")
    (tmp_path / "config.yaml").write_text("run: {name: x}\nlog: {project: p}\n")
    (tmp_path / "metrics.jsonl").write_text('{"split": "test", "step": 1, "loss": null}\n{"split": "train", "st')
    found = read_wandb_record(tmp_path)
    assert found is not None and found.id == "abc" and found.metrics == {"test/loss"}
    assert found.to_sync == (tmp_path / "wandb" / "offline-run-2",)
    (tmp_path / "config.yaml").write_text("run: [\n")
    with pytest.raises(FolderError, match="mend or remove it"):
        read_wandb_record(tmp_path)
