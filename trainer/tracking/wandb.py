"""Logs a run to W&B: one W&B run for all sessions of the training. A failure of W&B never ends training."""

import contextlib
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor, nn

from trainer.config.load import flatten
from trainer.config.schema import RunConfig
from trainer.errors import UserError
from trainer.run.files import DISK_ERRORS, error_reason
from trainer.run.folder import RunFolder
from trainer.run.sessions import session_summary
from trainer.text.escape import one_line
from trainer.tracking import wandb_session
from trainer.tracking.tracker import EvaluationMedia, Picture, Tracker
from trainer.tracking.wandb_media import mistake_images, tables_of_test_set
from trainer.tracking.wandb_mode import decide_mode, prepare_variables, resolve_mode

_INIT_TIMEOUT_SECONDS = 4.0  # a start may take 5 s; W&B needs the last second to open the run offline
_FINISH_TIMEOUT_SECONDS = 15.0
_REQUEST_TIMEOUT_SECONDS = "5"  # for the requests at the end of a run
_UPLOAD_TIMEOUT_SECONDS = 300.0  # for the weights


class WandbTracker(Tracker):
    """Logs to one W&B run. A continued run has the same id, which is in the run folder and in the checkpoints.

    Raises the errors of W&B's client, for GuardedTracker to catch.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, run_id: str, warn: Callable[[str], None]) -> None:
        """Opens the W&B run without user input, within seconds, and logs the rows that a killed session lost.

        Raises UserError if log.wandb=online and W&B cannot go online, or if W&B refuses a setting.
        """
        # Otherwise every process, even an offline one, sends telemetry at its end: 10 s behind a firewall.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_HTTP_TIMEOUT", _REQUEST_TIMEOUT_SECONDS)
        # Tables and weights wait for their upload in the run folder. The home folder, W&B's default, may be small.
        data_folder = str((folder.path / "wandb").resolve())
        os.environ.setdefault("WANDB_DATA_DIR", data_folder)
        home = os.path.expanduser("~")  # noqa: PTH111 (Path.home raises an error for a user without a home)
        if not (os.environ.get("HOME") and os.access(home, os.W_OK)):
            os.environ.setdefault("WANDB_CACHE_DIR", data_folder)
        if home == "~":  # there is no home, and W&B's client would raise an error
            for name in ("WANDB_CONFIG_DIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
                os.environ.setdefault(name, data_folder)
        requested_mode = resolve_mode(config.log.wandb)
        variable_problem = prepare_variables(requested_mode)
        import wandb  # lazy import: 1 s

        self._init_start = perf_counter()
        self._wandb: Any = wandb
        self._config, self._run_id, self._warn = config, run_id, warn
        self._run: Any = None
        self._pending_row: dict[str, Any] = {}
        mode, offline_reason = decide_mode(requested_mode, variable_problem)
        self._is_online = mode == "online"
        self._open_run(folder, offline_reason)
        run: Any = self._run
        run.config.update(session_summary(folder), allow_val_change=True)  # it changes with each session
        self._define_metrics()
        self._last_logged_position = self._log_missing_rows(folder)

    def _define_metrics(self) -> None:
        """Makes `step` the x axis of all charts. A workspace shows no charts of what only says where a row is."""
        self._run.define_metric("step", hidden=True)
        for split in ("train", "validation", "test"):
            for name in ("epoch", "samples", "seconds"):
                self._run.define_metric(f"{split}/{name}", step_metric="step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _open_run(self, folder: RunFolder, offline_reason: str) -> None:
        """Opens the run online or offline and prints which. An online run that fails to start continues offline."""
        try:
            self._run = self._init_run(folder)
        except Exception as error:  # every error: W&B's client raises private ones, and offline it may start
            offline_reason = one_line(error)
            if self._config.log.wandb == "online":
                raise UserError(
                    f"log.wandb=online: W&B did not start ({offline_reason}); "
                    "check the key and the network, or set log.wandb=offline"
                ) from None
            self._is_online = False
            os.environ["WANDB_MODE"] = "offline"
            with contextlib.suppress(SystemExit):  # W&B's way to say that its process has failed
                self._wandb.teardown()  # otherwise W&B refuses the second start, because the run id is in use
            try:
                self._run = self._init_run(folder)
            except (self._wandb.errors.Error, ValueError) as refusal:  # ValueError: a tag or a name
                raise UserError(
                    f"W&B refuses this run ({one_line(refusal)}); change run.name, log.project, log.group, log.tags, "
                    "log.job_type or log.notes, or set log.wandb=off"
                ) from None
        if self._is_online:
            self._warn(f"W&B: online, {self._run.url}")
        else:
            self._warn(f"W&B: offline ({offline_reason}); to upload it later: {self._sync_command()}")

    def _init_run(self, folder: RunFolder) -> Any:
        config = self._config
        settings = self._wandb.Settings(
            init_timeout=max(1.0, _INIT_TIMEOUT_SECONDS - (perf_counter() - self._init_start)),
            finish_timeout=_FINISH_TIMEOUT_SECONDS,
            finish_timeout_raises=True,
            console="off",
            silent=True,
        )
        return self._wandb.init(
            project=config.log.project,
            name=os.environ.get("WANDB_NAME") or config.run.name,
            id=self._run_id,
            resume="allow" if self._is_online else None,
            mode="online" if self._is_online else "offline",
            dir=str(folder.path),
            group=config.log.group or os.environ.get("WANDB_RUN_GROUP") or _folder_of(config.run.name),
            tags=config.log.tags or None,  # None: those of WANDB_TAGS
            job_type=config.log.job_type,
            notes=config.log.notes,
            config=_settings_by_section(config),
            settings=settings,
        )

    def _log_missing_rows(self, folder: RunFolder) -> wandb_session.RowPosition | None:
        """Logs the rows up to the checkpoint that a killed session lost; returns the position of W&B's last row."""
        session = Path(self._run.settings.sync_dir)
        try:
            end = wandb_session.last_position_on_disk(
                folder.path / "wandb", current_session=session, is_online=self._is_online
            )
        except wandb_session.UnreadableError as error:
            self._warn(f"W&B: rows of killed sessions may be missing or logged twice ({error})")
            return None
        if self._is_online:
            positions = (end, wandb_session.last_position(dict(self._run.summary)))
            end = max((position for position in positions if position is not None), default=None)
        for split, step, scalars in wandb_session.missing_rows(folder.metrics, end):
            self._log_metrics(split, scalars, step)
        return end

    def log(self, split: str, scalars: dict[str, float], step: int, wall_time: float | None = None) -> None:
        """Logs a row, unless W&B has it already. W&B records its own time, about a second after wall_time at most."""
        last_position = self._last_logged_position
        if last_position is None or wandb_session.row_position(split, scalars) > last_position:
            self._log_metrics(split, scalars, step)

    def _log_metrics(self, split: str, scalars: Mapping[str, float], step: int) -> None:
        """Logs a row at once, or, for the test set, together with the media of the evaluation that follow."""
        if "step" in self._pending_row:
            self._log_pending_row()
        self._pending_row |= {"step": step, **{f"{split}/{name}": value for name, value in scalars.items()}}
        if split != "test":
            self._log_pending_row()

    def on_start(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        """Adds the pictures of the first batch to the next row."""
        self._add_files(lambda: {name: self._wandb.Image(picture) for name, picture in pictures.items()})

    def log_media(self, media: EvaluationMedia) -> None:
        """Adds figures, feature maps and mistakes to the pending row of the test set.

        W&B uploads these image files in the background. Its tables are left for log_summary: to log a table, W&B
        waits for an answer of the server.
        """
        self._add_files(
            lambda: {
                "step": media.step,
                **{name: self._wandb.Image(picture) for name, picture in media.pictures.items()},
                **mistake_images(self._wandb, media.mistakes),
            }
        )

    def log_summary(self, settings: Mapping[str, Any], summary: Mapping[str, Any], weights: Path) -> None:
        """Logs tables of the test classes in the row of the last evaluation, and the weights if log.artifact is set."""
        row, self._pending_row = {"step": summary["steps"], **self._pending_row}, {}
        try:
            tables = tables_of_test_set(self._wandb, summary["test"]) if self._config.log.figures else {}
        except Exception as error:
            self._warn_of_lost_files(error)
            tables = {}
        if tables or len(row) > 1:
            self._log_row(row, tables)
        if self._config.log.artifact:
            try:
                self._log_weights(weights, summary["test"])
            except ConnectionError:  # W&B's process is gone
                raise
            except Exception as error:  # every error: the client's answer to a server that refuses is not documented
                self._warn_of_lost_files(error)

    def _log_weights(self, weights: Path, test: Mapping[str, Any]) -> None:
        artifact = self._wandb.Artifact(f"weights-{self._run.id}", type="model", metadata=dict(test))
        artifact.add_file(str(weights))
        logged_artifact = self._run.log_artifact(artifact)
        if self._is_online:
            logged_artifact.wait(timeout=_UPLOAD_TIMEOUT_SECONDS)

    def _add_files(self, make_files: Callable[[], dict[str, Any]]) -> None:
        """Adds values with files to the pending row. If that fails, as on a full disk, only these values are lost."""
        try:
            self._pending_row |= make_files()
        except Exception as error:
            self._warn_of_lost_files(error)

    def _log_pending_row(self) -> None:
        row, self._pending_row = self._pending_row, {}
        if row:
            self._log_row(row, {})

    def _log_row(self, row: dict[str, Any], tables: dict[str, Any]) -> None:
        """Logs a row, without files if the disk is full (W&B copies files) or the server does not answer."""
        try:
            self._run.log(row | tables)
        except ConnectionError:  # an OSError, but it means that W&B's process is gone
            raise
        except (*DISK_ERRORS, self._wandb.errors.Error) as error:
            self._warn_of_lost_files(error)
            numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            self._run.log(numbers)

    def _warn_of_lost_files(self, error: BaseException) -> None:
        reason = error_reason(error) if isinstance(error, DISK_ERRORS) else one_line(error)
        self._warn(f"W&B: tables, pictures or weights are left out ({reason})")

    def alert(self, title: str, text: str, urgent: bool) -> None:
        """Sends a W&B alert if log.alerts is set."""
        if self._config.log.alerts:
            self._run.alert(title, text, level="ERROR" if urgent else "INFO")

    def flush(self) -> None:
        """Does nothing: W&B has no flush. The next session logs the rows that a kill has lost."""

    def close(self, failed: bool = False) -> None:
        """Logs the pending row and waits a limited time for the upload."""
        self._log_pending_row()
        try:
            self._run.finish(exit_code=1 if failed else 0)
        except TimeoutError:
            self._warn(
                f"W&B: not all was uploaded within {_FINISH_TIMEOUT_SECONDS:g} s; to upload the rest: "
                f"{self._sync_command()} --include-online --yes"
            )

    def _sync_command(self) -> str:
        return shlex.join(["wandb", "sync", str(self._run.settings.sync_dir)])


def _folder_of(run_name: str) -> str | None:
    """Returns the folder part of a run name such as sweep/a; None without one."""
    return str(Path(run_name).parent) if "/" in run_name else None


def _settings_by_section(config: RunConfig) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for name, value in flatten(config).items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return sections
