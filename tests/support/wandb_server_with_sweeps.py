"""Runs the local W&B server, and adds sweeps and queries for saved workspaces and reports.

Arguments: the file of the server, and the folder for its data.
"""

import base64
import importlib.util
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("wandb_server", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["wandb_server"] = module
    spec.loader.exec_module(module)
    return module


def add_view_queries(handler: Any) -> None:
    """Adds the operations to the server's request handler. W&B's client calls them by these names."""
    upsert_view = handler.op_UpsertView2

    def views(self: Any) -> list[dict[str, Any]]:
        saved: list[dict[str, Any]] = self.st.__dict__.setdefault("views", [])
        return saved

    def upsert_with_base64_id(self: Any, variables: dict[str, Any]) -> Any:
        # The client decodes the id in the URL of a report as base64.
        view_id = variables.get("id") or base64.b64encode(f"View:{len(views(self))}".encode()).decode()
        return upsert_view(self, variables | {"id": view_id})

    def find_workspace(self: Any, variables: dict[str, Any]) -> Any:
        found = [view for view in views(self) if view["name"] == variables["viewName"]]
        nodes = [{"id": view["id"], "displayName": view["displayName"], "spec": view["spec"]} for view in found[-1:]]
        return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}

    def find_report(self: Any, variables: dict[str, Any]) -> Any:
        found = [view for view in views(self) if view["id"] == variables["reportId"]]
        if not found:
            return {"view": None}
        view = found[-1]
        project = {"id": "P", "name": view["projectName"], "entityName": view["entityName"]}
        keys = ("id", "name", "displayName", "description", "spec")
        return {"view": {key: view[key] for key in keys} | {"project": project, "createdAt": None, "updatedAt": None}}

    handler.op_UpsertView2 = handler.op_UpsertView = handler.op_upsertView = upsert_with_base64_id
    handler.op_View, handler.op_SpecificReport = find_workspace, find_report


def add_sweeps(handler: Any) -> None:
    """Adds grid sweeps: the operations of `wandb sweep` and `wandb agent`."""

    def upsert_sweep(self: Any, variables: dict[str, Any]) -> Any:
        config = yaml.safe_load(variables["config"])
        grid = {name: parameter["values"] for name, parameter in config["parameters"].items()}
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        project, entity = variables["projectName"], variables["entityName"] or "local"
        self.st.sweep = {"config": variables["config"], "program": config.get("program"), "points": points, "sent": 0}
        place = {"id": "P", "name": project, "entity": {"id": "E", "name": entity}}
        return {"upsertSweep": {"sweep": {"name": "sweep1", "project": place}, "configValidationWarnings": []}}

    def find_sweep(self: Any, variables: dict[str, Any]) -> Any:
        sweep = {"id": "S", "name": "sweep1", "config": self.st.sweep["config"], "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def create_agent(self: Any, variables: dict[str, Any]) -> Any:
        return {"createAgent": {"agent": {"id": "A"}}}

    def heartbeat(self: Any, variables: dict[str, Any]) -> Any:
        """Starts the next trial when none runs; ends the agent after the last one."""
        sweep, commands = self.st.sweep, []
        if not json.loads(variables["runState"]):
            number = sweep["sent"]
            sweep["sent"] += 1
            commands = [{"type": "exit"}]
            if number < len(sweep["points"]):
                args = {name: {"value": value} for name, value in sweep["points"][number].items()}
                commands = [{"type": "run", "run_id": f"trial{number}", "program": sweep["program"], "args": args}]
        return {"agentHeartbeat": {"agent": {"id": "A"}, "commands": json.dumps(commands)}}

    handler.op_UpsertSweep, handler.op_SweepWithRuns = upsert_sweep, find_sweep
    handler.op_CreateAgent, handler.op_Heartbeat = create_agent, heartbeat


if __name__ == "__main__":
    module = load_module(Path(sys.argv[1]))
    add_view_queries(module.Handler)
    add_sweeps(module.Handler)
    with module.FakeWandb(sys.argv[2]) as server:
        print(json.dumps({"base_url": server.base_url, "pid": os.getpid()}), flush=True)
        signal.pause()
