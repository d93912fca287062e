"""Runs the local W&B server and adds queries for saved workspaces and reports, which that server only stores.

Arguments: the file of the server, and the folder for its data.
"""

import base64
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


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


if __name__ == "__main__":
    module = load_module(Path(sys.argv[1]))
    add_view_queries(module.Handler)
    with module.FakeWandb(sys.argv[2]) as server:
        print(json.dumps({"base_url": server.base_url, "pid": os.getpid()}), flush=True)
        signal.pause()
