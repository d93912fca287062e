"""Tests `samecurve dashboard` with W&B's real clients: a saved view names every metric of the runs, and no other."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.local_wandb import Server, sync_sessions
from support.processes import REPOSITORY, SMALL, CommandResult, Ranks, Samecurve, finished_run

from launch.dashboard.panels import arrange_panels
from launch.dashboard.saved_urls import SavedUrls
from trainer.errors import FolderError
from trainer.report import figures
from trainer.run.record import RunRecord
from trainer.tracking.wandb_media import panel_kind

COMMAND = [sys.executable, str(REPOSITORY / "launch" / "main.py"), "dashboard"]
MEDIA = {"test/classes_table", "test/confusion", "test/mistakes"}
SETTINGS = ["train.max_steps=24", "log.every_steps=8", "log.report=false", "log.wandb=online"]


def test_each_metric_has_one_panel_in_its_section() -> None:
    metrics = ["train/loss", "test/loss", "validation/tta_accuracy", "train/gpu_memory_bytes", "train/new_metric", "x"]
    sections = arrange_panels(metrics, {"test/confusion": "image", "test/classes_table": "table"})
    assert {section.title: [panel.key for panel in section.panels] for section in sections} == {
        "Accuracy and loss": ["validation/tta_accuracy", "test/loss", "train/loss"],
        "Speed": ["train/gpu_memory_bytes"],
        "Classes and mistakes": ["test/classes_table", "test/confusion"],
        "Other": ["train/new_metric", "x"],
    }
    titles = {panel.key: panel.title for section in sections for panel in section.panels}
    assert titles["train/gpu_memory_bytes"] == "GPU memory in bytes, train" and titles["x"] == "x"


def test_only_the_progress_section_is_closed() -> None:
    sections = arrange_panels(["train/epoch", "train/loss"], {})
    assert {section.title: section.is_open for section in sections} == {"Accuracy and loss": True, "Progress": False}


def test_every_media_key_has_a_panel_kind() -> None:
    images = ["samples", "feature_maps/conv1", *(f"test/{name}" for name in figures.EVALUATION_FIGURES)]
    assert {panel_kind(key) for key in images} == {"image"}
    assert panel_kind("test/classes_table") == panel_kind("test/confusion_matrix_table") == "table"
    assert panel_kind("train/samples") is panel_kind("test/loss") is None


def metric_names_in_view(spec: Any) -> set[str]:
    """Returns every metric that a saved view names: on an axis, in a panel or in a column."""
    if isinstance(spec, dict):
        names = {*spec.get("metrics", []), *spec.get("mediaKeys", []), *spec.get("columnOrder", [])}
        if spec.get("name") == "pick":  # the panel of a table
            names.add(spec["inputs"]["key"]["val"])
        return names.union(*map(metric_names_in_view, spec.values()))
    return set().union(*map(metric_names_in_view, spec)) if isinstance(spec, list) else set()


def saved_views(server: Server) -> list[dict[str, Any]]:
    """Returns all views in the order in which the client saved them; a replaced view occurs several times."""
    path = server.folder / "views.json"
    return json.loads(path.read_text()) if path.is_file() else []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of wandb and wandb-workspaces
def test_dashboard_shows_all_metrics_and_a_second_call_replaces_it(
    server: Server, samecurve: Samecurve, ranks: Ranks
) -> None:
    import wandb

    wandb.teardown()  # wandb reads its environment variables once a process
    ranks.run(1, *SMALL, "run.name=x", *SETTINGS, fault="")
    online = Path("runs/x")
    log_media((online / "wandb" / "run-id").read_text())
    finished_run(Path("runs"), *SETTINGS, "run.name=group/lr=0.02", "log.wandb=offline", "data.validation_fraction=0.1")
    offline = Path("runs/group/lr=0.02")
    _, errors = samecurve("dashboard", "group", code=2)
    assert "W&B has none of these runs in local/samecurve; upload them: wandb sync" in errors
    assert not saved_views(server)
    sync_sessions(server, *(offline / "wandb").glob("offline-run-*"))

    output, errors = samecurve("dashboard")
    workspace_line, report_line = output.splitlines()
    assert not errors and workspace_line.startswith(f"workspace: {server.url}/local/samecurve?nw=")
    assert report_line.startswith(f"report: {server.url}/local/samecurve/reports/samecurve--")
    client_keys = {"step", "_step", "_runtime", "_timestamp"}
    histories = [run["history"] for run in server.request("/_/runs").values()]
    logged_keys = {key for history in histories for row in history for key in row} - client_keys
    assert {"validation/loss", "train/lr", "test/accuracy", *MEDIA} <= logged_keys
    views = saved_views(server)
    assert [view["type"] for view in views] == ["project-view", "runs"]
    for view in views:
        names = metric_names_in_view(json.loads(view["spec"]))
        assert {name for name in names if ":" not in name} == logged_keys
        columns = {name.partition(":")[2] for name in names if name.startswith("summary:")}
        assert "test/accuracy" in columns and columns <= logged_keys
        assert '"xAxis": "step"' in json.dumps(json.loads(view["spec"]))

    assert samecurve("dashboard")[0] == output
    assert [view["id"] for view in saved_views(server)] == [view["id"] for view in views] * 2
    for first, second in zip(views, saved_views(server)[2:], strict=True):
        assert metric_names_in_view(json.loads(second["spec"])) == metric_names_in_view(json.loads(first["spec"]))

    output, _ = samecurve("dashboard", "group/lr=0.02", "--only", "report")
    assert output.startswith("report: ") and "samecurve:-group-lr-0.02--" in output
    assert (offline / "wandb" / "run-id").read_text() in saved_views(server)[-1]["spec"]
    assert (online / "wandb" / "run-id").read_text() not in saved_views(server)[-1]["spec"]

    replace_saved_urls_by_ids_of_version_1()
    assert samecurve("dashboard", "--only", "workspace")[0].startswith(f"workspace: {server.url}/local/samecurve?nw=")
    assert saved_views(server)[-1]["id"] not in [view["id"] for view in views], "a new one, without an error"

    (Path("runs") / "unlogged").mkdir()
    (Path("runs") / "unlogged" / "config.yaml").touch()
    _, errors = samecurve("dashboard", "unlogged", code=2)
    assert "runs/unlogged was not logged to W&B" in errors


def log_media(run_id: str) -> None:
    """Logs a table and images to an existing run."""
    script = (
        "import sys, numpy, wandb\n"
        "run = wandb.init(project='samecurve', id=sys.argv[1], resume='must')\n"
        "black = wandb.Image(numpy.zeros((4, 4, 3), numpy.uint8))\n"
        "table = wandb.Table(columns=['a'], data=[[1]])\n"
        "run.log({'test/classes_table': table, 'test/confusion': black, 'test/mistakes': [black, black]})\n"
        "run.finish()\n"
    )
    subprocess.run([sys.executable, "-c", script, run_id], check=True, timeout=150, capture_output=True)


def replace_saved_urls_by_ids_of_version_1() -> None:
    path = Path("runs/dashboards.json")
    content = json.loads(path.read_text())
    for titles in content.values():
        for kinds in titles.values():
            kinds |= {"workspace": {"_internal_id": "V0", "_internal_name": "nw-x-v"}, "report": {"id": "V1"}}
    path.write_text(json.dumps(content))


def test_damaged_url_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dashboards.json"
    urls = SavedUrls(path, "http://server/entity")
    assert urls.get("p", "title", "report") == ""
    urls.set("p", "title", "report", "http://server/entity/p/reports/title--x")
    urls.set("p", "title", "workspace", "http://server/entity/p?nw=x")
    assert urls.get("p", "title", "report") == "http://server/entity/p/reports/title--x"
    assert urls.get("p", "other title", "report") == urls.get("q", "title", "report") == ""
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(FolderError, match="repair or remove it"):
            urls.get("p", "title", "report")


@pytest.mark.parametrize("problem", ["no key", "no network", "key refused", "no package"])
def test_missing_requirement_is_one_line_within_seconds(
    problem: str, launch: Callable[..., CommandResult], server: Server
) -> None:
    folder = Path("runs/x")
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "run-id").write_text("abcd1234")
    (folder / "config.yaml").write_text("run: {name: x}\nlog: {project: p}\n")
    env, expected = {
        "no key": ({"WANDB_API_KEY": ""}, "no API key: set WANDB_API_KEY or run `wandb login`"),
        "no network": ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, "no connection to http://127.0.0.1:9"),
        "key refused": ({}, "check the key, --entity, --project and the network"),
        "no package": ({"PYTHONPATH": "without_package"}, "pip install 'samecurve[dashboard]'"),
    }[problem]
    server.inject_fault(match="graphql", status=401)
    Path("without_package").mkdir()
    Path("without_package/wandb_workspaces.py").write_text("raise ModuleNotFoundError(name='wandb_workspaces')\n")
    start = time.monotonic()
    result = launch(COMMAND, **env)
    assert time.monotonic() - start < 60  # 5 s, and the imports on a busy machine; W&B's own retries take minutes
    (line,) = result.err.splitlines()
    assert result.code == 2 and line.startswith("samecurve: ") and expected in line


def test_run_record_has_wandb_id_metrics_and_sessions_to_upload(tmp_path: Path) -> None:
    assert RunRecord(tmp_path).wandb_id == ""
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    (tmp_path / "wandb" / "offline-run-2").mkdir()
    (tmp_path / "wandb" / "offline-run-1" / "run-abc.wandb.synced").touch()
    (tmp_path / "wandb" / "run-id").write_text("abc\n")
    (tmp_path / "config.yaml").write_text("run: {name: x}\nlog: {project: p}\n")
    (tmp_path / "metrics.jsonl").write_text('{"split": "test", "step": 1, "loss": null}\n{"split": "train", "st')
    run = RunRecord(tmp_path)
    assert run.wandb_id == "abc" and run.wandb_project == "p" and run.metric_names == {"test/loss"}
    assert run.offline_wandb_sessions == (tmp_path / "wandb" / "offline-run-2",)
    (tmp_path / "config.yaml").write_text("run: [\n")
    with pytest.raises(FolderError, match=r"config\.yaml"):
        _ = RunRecord(tmp_path).wandb_project
