"""Logged runs in, a W&B workspace and a report of just the metrics that those runs have out. No torch."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.dashboard import panels
from launch.dashboard.panels import Panel, Section
from trainer.errors import DashboardError, FolderError
from trainer.run.files import replace_file
from trainer.run.wandb_record import WandbRecord, sync_command
from trainer.tracking.wandb_mode import decide_mode

KINDS = ("workspace", "report")
_REQUEST_SECONDS = 10
_LONGEST_TITLE = 120  # W&B allows a report 128
_COLUMNS = 3
_WIDTH, _HEIGHT = 8, 6  # of a panel; a report is 24 wide


class Dashboard:
    """One W&B server, and what was made there."""

    def __init__(self, entity: str | None, memory: Path) -> None:
        """memory: a file that says what was made, so that it is replaced and not made twice.

        Raises DashboardError when there is no key, no network or no wandb-workspaces; within seconds.
        """
        os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(_REQUEST_SECONDS))  # wandb reads it when it is imported
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode, why = decide_mode("auto")
        if mode != "online":
            raise DashboardError(f"a dashboard is made on W&B's server, which cannot be used now: {why}")
        try:
            import wandb_workspaces.reports.v2
            import wandb_workspaces.workspaces
        except ModuleNotFoundError as error:
            raise DashboardError(
                f"a dashboard needs {error.name}, which is not installed: pip install 'samecurve[dashboard]'"
            ) from None
        import wandb

        self._workspaces, self._reports = wandb_workspaces.workspaces, wandb_workspaces.reports.v2
        with _in_one_line():
            self._api = wandb.Api()
            self._entity = str(entity or self._api.settings["entity"] or self._api.default_entity)
        self._memory = Memory(memory, f"{self._api.settings['base_url']}/{self._entity}")

    def write(
        self, project: str, title: str, runs: list[WandbRecord], only: bool, kinds: tuple[str, ...] = KINDS
    ) -> Iterator[tuple[str, str]]:
        """Makes each kind, or replaces it: its kind and address. only: it does not show the project's other runs."""
        title = re.sub(r"[^\w.,: -]+", " ", title)[:_LONGEST_TITLE]  # it becomes a part of an address
        sections = panels.arrange(frozenset().union(*(run.metrics for run in runs)), self._media(project, runs))
        filters = [_is_one_of([run.id for run in runs])] if only else []
        makers = {"workspace": self._workspace, "report": self._report}
        for kind in kinds:
            made = makers[kind](project, title, sections, filters)
            names = {"workspace": ("_internal_id", "_internal_name"), "report": ("id",)}[kind]
            self._save(made, self._memory.recall(project, title, kind))
            yield kind, str(made.url)
            self._memory.keep(project, title, kind, {name: getattr(made, name) for name in names})

    def _media(self, project: str, runs: list[WandbRecord]) -> dict[str, str]:
        """The kind of panel that each table and image of the runs wants, by what W&B's server has of them."""
        ids = {run.id for run in runs}
        with _in_one_line():
            found = self._api.runs(f"{self._entity}/{project}", filters={"name": {"$in": sorted(ids)}}, lazy=False)
            summaries = [dict(run.summary) for run in found if run.id in ids]
        if not summaries:
            waiting = tuple(path for run in runs for path in run.to_sync)
            mend = f"upload them: {sync_command(waiting)}" if waiting else "--entity and --project say where they are"
            raise DashboardError(f"W&B has none of these runs in {self._entity}/{project}; {mend}")
        types = {
            key: value.get("_type", "")
            for summary in summaries
            for key, value in summary.items()
            if hasattr(value, "get")
        }
        return {key: panels.KINDS[kind] for key, kind in types.items() if kind in panels.KINDS}

    def _workspace(self, project: str, title: str, sections: list[Section], filters: list[Any]) -> Any:
        ws = self._workspaces
        return ws.Workspace(
            entity=self._entity,
            project=project,
            name=title,
            sections=[
                ws.Section(
                    name=section.title,
                    panels=self._panels(section),
                    is_open=section.is_open,
                    layout_settings=ws.SectionLayoutSettings(
                        columns=_COLUMNS, rows=-(-len(section.panels) // _COLUMNS)
                    ),
                    panel_settings=ws.SectionPanelSettings(x_axis="step"),
                )
                for section in sections
            ],
            settings=ws.WorkspaceSettings(x_axis="step"),
            runset_settings=ws.RunsetSettings(filters=filters, pinned_columns=_columns(sections)),
        )

    def _report(self, project: str, title: str, sections: list[Section], filters: list[Any]) -> Any:
        wr = self._reports
        runs = [wr.Runset(self._entity, project, filters=filters, pinned_columns=_columns(sections))]
        blocks = [wr.TableOfContents()]
        for section in sections:
            blocks += [wr.H2(section.title), wr.PanelGrid(runsets=runs, panels=self._panels(section))]
        settings = wr.RunComparer(diff_only=True, layout=wr.Layout(w=_COLUMNS * _WIDTH, h=2 * _HEIGHT))
        blocks += [wr.H2("What differs between the runs"), wr.PanelGrid(runsets=runs, panels=[settings])]
        return wr.Report(
            project,
            self._entity,
            title=title,
            description="By `samecurve dashboard`, which replaces it when it is called again.",
            blocks=blocks,
            width="fluid",
        )

    def _panels(self, section: Section) -> list[Any]:
        return [self._panel(panel, *divmod(index, _COLUMNS)) for index, panel in enumerate(section.panels)]

    def _panel(self, panel: Panel, row: int, column: int) -> Any:
        wr = self._reports
        layout = wr.Layout(x=column * _WIDTH, y=row * _HEIGHT, w=_WIDTH, h=_HEIGHT)
        if panel.kind == "table":
            return wr.WeavePanelSummaryTable(table_name=panel.key, layout=layout)
        if panel.kind == "image":
            return wr.MediaBrowser(title=panel.title, media_keys=[panel.key], layout=layout)
        return wr.LinePlot(title=panel.title, x="step", y=[panel.key], title_x="step", layout=layout)

    def _save(self, made: Any, before: dict[str, str]) -> None:
        """In the place of what was made before, unless somebody has removed that."""
        if before:
            for name, value in before.items():
                setattr(made, name, value)
            with contextlib.suppress(DashboardError), _in_one_line():
                made.save()
                return
            for name in before:
                setattr(made, name, "")
        with _in_one_line():
            made.save()


class Memory:
    """A file of JSON: server/entity/project, title, kind, then the names that W&B has given to what was made."""

    def __init__(self, path: Path, server: str) -> None:
        self._path, self._server = path, server

    def recall(self, project: str, title: str, kind: str) -> dict[str, str]:
        """Empty when nothing is known of it."""
        found: dict[str, str] = self._all().get(f"{self._server}/{project}", {}).get(title, {}).get(kind, {})
        return found

    def keep(self, project: str, title: str, kind: str, names: dict[str, str]) -> None:
        """Raises FolderError."""
        found = self._all()
        found.setdefault(f"{self._server}/{project}", {}).setdefault(title, {})[kind] = names
        try:
            replace_file(self._path, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
        except OSError as error:
            raise FolderError(
                f"{self._path} cannot be written ({error.strerror}); without it the next call makes a second {kind}"
            ) from None

    def _all(self) -> Any:
        try:
            return json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise FolderError(
                f"{self._path} is not what samecurve dashboard wrote ({error}); mend or remove it"
            ) from None


def _is_one_of(ids: list[str]) -> Any:
    from wandb_workspaces import expr

    return expr.Metric("ID").isin(ids)


def _columns(sections: list[Section]) -> list[str]:
    """Of the table of runs: what they reached at last."""
    return [f"summary:{panel.key}" for section in sections if section.title == panels.FIRST for panel in section.panels]


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """W&B's own ways of saying no."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        yield
    except (wandb.errors.Error, WandbApiFailedError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise DashboardError(f"W&B did not do it ({why}); check the key, --entity, --project and the network") from None
