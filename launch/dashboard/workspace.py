"""Creates a W&B workspace and a W&B report with a panel for each metric of the given runs. No torch."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.dashboard.panels import RESULTS, Panel, Section, arrange_panels
from launch.dashboard.saved_urls import SavedUrls
from trainer.errors import DashboardError
from trainer.run.record import RunRecord
from trainer.text.escape import one_line
from trainer.tracking.wandb_media import PanelKind, panel_kind
from trainer.tracking.wandb_mode import decide_mode, prepare_variables, resolve_mode

KINDS = ("workspace", "report")
# Attributes that a saved view takes from a new view; all others, such as its id, stay.
_REPLACED_ATTRIBUTES = {
    "workspace": ("name", "sections", "settings", "runset_settings"),
    "report": ("title", "description", "blocks", "width"),
}
_REQUEST_TIMEOUT_SECONDS = 10
_MAX_TITLE_LENGTH = 120  # W&B's limit for a report is 128
_COLUMNS = 3
_PANEL_WIDTH, _PANEL_HEIGHT = 8, 6  # a report is 24 wide


class Dashboard:
    """Saves workspaces and reports on one W&B server."""

    def __init__(self, entity: str | None, urls_file: Path) -> None:
        """Connects to the server.

        entity: W&B user or team; None selects the default of the API key.
        urls_file: file with the URLs of saved views, so that they are replaced.
        Raises DashboardError within seconds if the key, the network or the package wandb-workspaces is missing.
        """
        os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(_REQUEST_TIMEOUT_SECONDS))  # wandb reads it at import
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        requested_mode = resolve_mode("auto")
        mode, problem = "off", "WANDB_MODE or WANDB_DISABLED forbids it"
        if requested_mode != "off":
            mode, problem = decide_mode(requested_mode, prepare_variables(requested_mode))
        if mode != "online":
            raise DashboardError(f"a dashboard needs W&B's server, which cannot be used now: {problem}")
        try:
            import wandb_workspaces.reports.v2
            import wandb_workspaces.workspaces
        except ModuleNotFoundError as error:
            raise DashboardError(
                f"a dashboard needs {error.name}, which is not installed: pip install 'samecurve[dashboard]'"
            ) from None
        import wandb

        self._workspaces: Any = wandb_workspaces.workspaces
        self._reports: Any = wandb_workspaces.reports.v2
        with _wandb_errors_as_user_errors():
            self._api = wandb.Api()
            self._entity = str(entity or self._api.settings["entity"] or self._api.default_entity)
        self._urls = SavedUrls(urls_file, f"{self._api.settings['base_url']}/{self._entity}")

    def write(
        self, project: str, title: str, runs: list[RunRecord], only: bool, kinds: tuple[str, ...] = KINDS
    ) -> Iterator[tuple[str, str]]:
        """Creates or replaces a view of each kind, and yields its kind and URL.

        only: hide the project's other runs.
        Raises DashboardError if W&B refuses a request or has none of the runs, FolderError if urls_file is unusable.
        """
        title = re.sub(r"[^\w.,: -]+", " ", title)[:_MAX_TITLE_LENGTH]  # W&B puts the title into the URL
        metrics = frozenset[str]().union(*(run.metric_names for run in runs))
        sections = arrange_panels(metrics, self._logged_media(project, runs))
        filters = [_has_id([run.wandb_id for run in runs])] if only else []
        builders = {"workspace": self._build_workspace, "report": self._build_report}
        for kind in kinds:
            view = builders[kind](project, title, sections, filters)
            url = self._save(kind, view, self._urls.get(project, title, kind))
            yield kind, url
            self._urls.set(project, title, kind, url)

    def _logged_media(self, project: str, runs: list[RunRecord]) -> dict[str, PanelKind]:
        """Returns the images and tables that the server has of the runs, with the panel kind of each key."""
        ids = {run.wandb_id for run in runs}
        with _wandb_errors_as_user_errors():
            filters = {"name": {"$in": sorted(ids)}}
            server_runs = self._api.runs(f"{self._entity}/{project}", filters=filters, lazy=False)
            summaries = [dict(run.summary) for run in server_runs if run.id in ids]
        if not summaries:
            sessions = tuple(folder for run in runs for folder in run.offline_wandb_sessions)
            fix = f"upload them: {sync_command(sessions)}" if sessions else "set --entity and --project to their place"
            raise DashboardError(f"W&B has none of these runs in {self._entity}/{project}; {fix}")
        return {key: kind for summary in summaries for key in summary if (kind := panel_kind(key)) is not None}

    def _build_workspace(self, project: str, title: str, sections: list[Section], filters: list[Any]) -> Any:
        ws = self._workspaces
        return ws.Workspace(
            entity=self._entity,
            project=project,
            name=title,
            sections=[
                ws.Section(
                    name=section.title,
                    panels=self._build_panels(section),
                    is_open=section.is_open,
                    layout_settings=ws.SectionLayoutSettings(
                        columns=_COLUMNS, rows=-(-len(section.panels) // _COLUMNS)
                    ),
                    panel_settings=ws.SectionPanelSettings(x_axis="step"),
                )
                for section in sections
            ],
            settings=ws.WorkspaceSettings(x_axis="step"),
            runset_settings=ws.RunsetSettings(filters=filters, pinned_columns=_result_columns(sections)),
        )

    def _build_report(self, project: str, title: str, sections: list[Section], filters: list[Any]) -> Any:
        wr = self._reports
        runs = [wr.Runset(self._entity, project, filters=filters, pinned_columns=_result_columns(sections))]
        blocks = [wr.TableOfContents()]
        for section in sections:
            blocks += [wr.H2(section.title), wr.PanelGrid(runsets=runs, panels=self._build_panels(section))]
        comparer = wr.RunComparer(diff_only=True, layout=wr.Layout(w=_COLUMNS * _PANEL_WIDTH, h=2 * _PANEL_HEIGHT))
        blocks += [wr.H2("Differences between the runs"), wr.PanelGrid(runsets=runs, panels=[comparer])]
        return wr.Report(
            project,
            self._entity,
            title=title,
            description="Created by `samecurve dashboard`, which replaces it at the next call.",
            blocks=blocks,
            width="fluid",
        )

    def _build_panels(self, section: Section) -> list[Any]:
        return [self._build_panel(panel, *divmod(index, _COLUMNS)) for index, panel in enumerate(section.panels)]

    def _build_panel(self, panel: Panel, row: int, column: int) -> Any:
        wr = self._reports
        layout = wr.Layout(x=column * _PANEL_WIDTH, y=row * _PANEL_HEIGHT, w=_PANEL_WIDTH, h=_PANEL_HEIGHT)
        if panel.kind == "table":
            return wr.WeavePanelSummaryTable(table_name=panel.key, layout=layout)
        if panel.kind == "image":
            return wr.MediaBrowser(title=panel.title, media_keys=[panel.key], layout=layout)
        return wr.LinePlot(title=panel.title, x="step", y=[panel.key], title_x="step", layout=layout)

    def _save(self, kind: str, new_view: Any, saved_url: str) -> str:
        """Saves a view in place of the view at saved_url, or as a new one if that does not exist. Returns its URL."""
        view = new_view
        if saved_url and (saved_view := self._load(kind, saved_url)) is not None:
            view = saved_view
            for name in _REPLACED_ATTRIBUTES[kind]:
                setattr(view, name, getattr(new_view, name))
        with _wandb_errors_as_user_errors():
            view.save()
            return str(view.url)

    def _load(self, kind: str, url: str) -> Any:
        """Returns the saved view at a URL; None if it cannot be loaded, for example because a user deleted it."""
        view_class = {"workspace": self._workspaces.Workspace, "report": self._reports.Report}[kind]
        # Every error: for a deleted view it is ValueError, TypeError or a private class. If it is the network, the
        # request that saves the view reports it.
        with contextlib.suppress(Exception):
            return view_class.from_url(url)
        return None


def sync_command(folders: tuple[Path, ...]) -> str:
    """Returns the command that uploads offline sessions, oldest first.

    It uploads them one by one: `wandb sync` skips the sessions after one that was killed.
    """
    return " && ".join(shlex.join(["wandb", "sync", "--yes", str(folder)]) for folder in folders)


def _has_id(ids: list[str]) -> Any:
    """Returns a W&B filter for runs with one of these ids."""
    from wandb_workspaces import expr

    return expr.Metric("ID").isin(ids)


def _result_columns(sections: list[Section]) -> list[str]:
    """Returns the columns of the run table: the last accuracy and loss of each run."""
    return [f"summary:{panel.key}" for section in sections if section.title == RESULTS for panel in section.panels]


@contextlib.contextmanager
def _wandb_errors_as_user_errors() -> Iterator[None]:
    """Turns every error of W&B's client into a DashboardError.

    Every error, because a request that fails raises a private class. Use it around calls of W&B's client only.
    """
    try:
        yield
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise DashboardError(
            f"W&B refused the request ({reason}); check the key, --entity, --project and the network"
        ) from None
