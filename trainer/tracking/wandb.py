"""What a run tells in, one W&B run out."""

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor, nn

from trainer.config.load import flatten
from trainer.config.schema import RunConfig
from trainer.errors import UserError
from trainer.run.files import DISK_ERRORS, error_reason
from trainer.run.folder import RunFolder
from trainer.run.sessions import session_summary
from trainer.tracking import wandb_session
from trainer.tracking.tracker import EvaluationMedia, Picture, Tracker
from trainer.tracking.wandb_mode import decide_mode

_DECIDE_SECONDS = 4.0  # of the 5 that it may take; W&B needs the rest to open the run offline
_FINISH_SECONDS = 15.0
_REQUEST_SECONDS = "5"  # of what is asked at the end
_UPLOAD_SECONDS = 300.0  # at most, for weights
_MOST_CLASSES = 50  # of a confusion matrix that W&B draws cell by cell


class WandbTracker(Tracker):
    """One W&B run for the whole training, however often it is continued: its id lies in the run folder and in the
    checkpoints."""

    def __init__(self, config: RunConfig, folder: RunFolder, run_id: str, warn: Callable[[str], None]) -> None:
        """Raises UserError when log.wandb=online and that is not possible. Never asks, never waits long."""
        # Else every process, the offline ones too, calls home at its end: 10 s where a firewall swallows packets.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_HTTP_TIMEOUT", _REQUEST_SECONDS)
        # Tables and weights wait for their upload here, not in a home folder that may be small.
        os.environ.setdefault("WANDB_DATA_DIR", str((folder.path / "wandb").resolve()))
        import wandb  # late: 1 s

        self._began = perf_counter()
        mode, why = decide_mode(config.log.wandb)
        self._wandb: Any = wandb
        self._config, self._run_id = config, run_id
        self._run: Any = None
        self._warn = warn
        self._held: dict[str, Any] = {}
        self._gone = (ConnectionError, wandb.sdk.mailbox.MailboxClosedError, wandb.sdk.mailbox.HandleAbandonedError)
        self._is_gone = False
        self._is_online = mode == "online"
        try:
            self._run = self._start(mode, folder)
        except (wandb.errors.Error, ValueError) as error:  # ValueError: a tag or a name that W&B does not take
            why = " ".join(str(error).split())[:160]
            if config.log.wandb == "online":
                raise UserError(
                    f"log.wandb=online: W&B did not start ({why}); "
                    "check the key and the network, or set log.wandb=offline"
                ) from None
            mode = "offline"
            self._is_online = False
            wandb.teardown()  # else it holds that this run is in use already
            try:
                self._run = self._start(mode, folder)
            except (wandb.errors.Error, ValueError) as refusal:
                why = " ".join(str(refusal).split())[:160]
                raise UserError(
                    f"W&B does not take this run ({why}); change run.name, log.project, log.group, log.tags, "
                    "log.job_type or log.notes, or set log.wandb=off"
                ) from None
        if mode == "online":
            warn(f"W&B: online, {self._run.url}")
        else:
            warn(f"W&B: offline ({why}); to upload it later: {self._sync_command()}")
        self._run.config.update(session_summary(folder), allow_val_change=True)  # another at each start
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._end = self._make_up(folder, mode)

    def _make_up(self, folder: RunFolder, mode: str) -> wandb_session.RowPosition | None:
        """Logs what a killed session has lost, up to the checkpoint; where the rows end that W&B has then."""
        session = Path(self._run.settings.sync_dir)
        try:
            end = wandb_session.last_position_on_disk(folder.path / "wandb", but=session, is_online=mode == "online")
        except wandb_session.UnreadableError as error:
            self._warn(f"W&B: rows of killed sessions may be missing, or there twice ({error})")
            return None
        if mode == "online":
            summary = self._run.summary
            on_server = wandb_session.last_position({name: summary[name] for name in summary.keys()})
            end = max((found for found in (end, on_server) if found is not None), default=None)
        for split, step, scalars in wandb_session.missing_rows(folder.metrics, end):
            self._log(split, scalars, step)
        return end

    def _start(self, mode: str, folder: RunFolder) -> Any:
        config = self._config
        settings = self._wandb.Settings(
            init_timeout=max(1.0, _DECIDE_SECONDS - (perf_counter() - self._began)),
            finish_timeout=_FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            silent=True,
        )
        return self._wandb.init(
            project=config.log.project,
            name=config.run.name,
            id=self._run_id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(folder.path),
            group=config.log.group or (str(Path(config.run.name).parent) if "/" in config.run.name else None),
            tags=config.log.tags,
            job_type=config.log.job_type,
            notes=config.log.notes,
            config=_nested(config),
            settings=settings,
        )

    def log(self, split: str, scalars: dict[str, float], step: int, at: float | None = None) -> None:
        """A row of the test set waits for what there is to show of it: that belongs into the same row."""
        if self._end is None or wandb_session.row_position(split, scalars) > self._end:
            self._log(split, scalars, step, at)

    def _log(self, split: str, scalars: dict[str, float], step: int, at: float | None = None) -> None:
        if "step" in self._held:
            self._log_held()
        self._held |= {"step": step, **{f"{split}/{name}": value for name, value in scalars.items()}}
        if at is not None:
            self._held["_timestamp"] = at  # W&B's own name
        if split != "test":
            self._log_held()

    def on_start(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        self._hold_files(lambda: {name: self._wandb.Image(picture) for name, picture in pictures.items()})

    def log_media(self, media: EvaluationMedia) -> None:
        self._hold_files(lambda: {"step": media.step, **self._shown(media)})

    def _shown(self, media: EvaluationMedia) -> dict[str, Any]:
        """Figures, feature maps, the surest mistakes: files, which W&B uploads in the background. Its tables are none:
        to log one it asks the server, and waits."""
        image = self._wandb.Image
        shown: dict[str, Any] = {name: image(picture) for name, picture in media.pictures.items()}
        if media.told.mistakes:
            shown["test/mistakes"] = [
                image(each.image(), caption=f"{each.predicted} {each.probability:.0%}, is {each.label}")
                for each in media.told.mistakes
            ]
        return shown

    def _hold_files(self, make: Callable[[], dict[str, Any]]) -> None:
        """Puts what goes into files beside the row that waits; a disk that is full costs these alone."""
        try:
            self._held |= make()
        except DISK_ERRORS as error:
            self._lose_files(error)

    def _log_held(self) -> None:
        held, self._held = self._held, {}
        if held:
            self._log_row(held, {})

    def _log_row(self, row: dict[str, Any], files: dict[str, Any]) -> None:
        """W&B copies files into the run's folder; when the disk is full, or the server does not answer, the row goes
        without."""
        try:
            self._tell(lambda: self._run.log(row | files))
        except (*DISK_ERRORS, self._wandb.errors.Error) as error:
            self._lose_files(error)
            numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            self._tell(lambda: self._run.log(numbers))

    def _tell(self, do: Callable[[], object]) -> None:
        """Asks W&B's own process, without which training goes on."""
        if self._is_gone:
            return
        try:
            do()
        except self._gone as error:
            self._is_gone = True
            why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            self._warn(f"W&B's process is gone ({why}): no more rows there in this session; metrics.jsonl has all")

    def _lose_files(self, error: BaseException) -> None:
        why = error_reason(error) if isinstance(error, DISK_ERRORS) else " ".join(str(error).split())[:160]
        self._warn(f"W&B: tables, pictures or weights are left out ({why})")

    def alert(self, title: str, text: str, urgent: bool) -> None:
        if self._config.log.alerts:
            self._tell(lambda: self._run.alert(title, text, level="ERROR" if urgent else "INFO"))

    def log_summary(self, settings: Mapping[str, Any], summary: Mapping[str, Any], weights: Path) -> None:
        """In the row of the last evaluation the classes and the confusion matrix as W&B's own tables."""
        row, self._held = {"step": summary["steps"], **self._held}, {}
        try:
            tables = self._tables(summary["test"]) if self._config.log.figures else {}
        except DISK_ERRORS as error:
            self._lose_files(error)
            tables = {}
        if tables or len(row) > 1:
            self._log_row(row, tables)
        if self._config.log.artifact:
            try:
                self._tell(lambda: self._log_weights(weights, summary["test"]))
            except (*DISK_ERRORS, self._wandb.errors.Error, ValueError, RuntimeError) as error:  # ValueError: refused
                self._lose_files(error)

    def _log_weights(self, weights: Path, test: Mapping[str, Any]) -> None:
        artifact = self._wandb.Artifact(f"weights-{self._run.id}", type="model", metadata=dict(test))
        artifact.add_file(str(weights))
        logged = self._run.log_artifact(artifact)
        if self._is_online:
            logged.wait(timeout=_UPLOAD_SECONDS)

    def _tables(self, test: Mapping[str, Any]) -> dict[str, Any]:
        wandb, classes = self._wandb, test["classes"]
        names = [row["name"] for row in classes]
        rows = [[row[key] for key in ("name", "precision", "recall", "f1", "support")] for row in classes]
        tables = {"test/classes_table": wandb.Table(["class", "precision", "recall", "f1", "images"], rows)}
        if len(classes) <= _MOST_CLASSES:
            counts = np.array(test["confusion"])
            truth, predicted = (np.repeat(place.ravel(), counts.ravel()).tolist() for place in np.indices(counts.shape))
            tables["test/confusion_matrix"] = wandb.plot.confusion_matrix(
                y_true=truth, preds=predicted, class_names=names, title="confusion matrix of the test set"
            )
        return tables

    def flush(self) -> None: ...

    def close(self, failed: bool = False) -> None:
        """Waits for the upload, but not for ever."""
        self._log_held()
        try:
            self._tell(lambda: self._run.finish(exit_code=1 if failed else 0))
        except TimeoutError:
            self._warn(
                f"W&B: not all was uploaded within {_FINISH_SECONDS:g} s; for the rest: "
                f"{self._sync_command()} --include-online --yes"
            )

    def _sync_command(self) -> str:
        return shlex.join(["wandb", "sync", str(self._run.settings.sync_dir)])


def _nested(config: RunConfig) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for name, value in flatten(config).items():
        section, _, key = name.partition(".")
        nested.setdefault(section, {})[key] = value
    return nested
