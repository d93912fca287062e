"""One session of a run, which is one start of it: builds the training loop and records how the session ends."""

import contextlib
import functools
import os
import sys
import time

from accelerate.utils import set_seed

from trainer.build import build_components
from trainer.config.load import flatten
from trainer.config.schema import RunConfig
from trainer.config.validate import check_ranks
from trainer.data.identity import DATA_FILE
from trainer.data.loader import lost_worker
from trainer.distributed.world import World
from trainer.errors import FolderError, PeerError
from trainer.loop import Trainer
from trainer.nonfinite import SkippedSteps
from trainer.optim.schedule import describe_changed_length
from trainer.report.writer import NullReportWriter, build_report_writer
from trainer.run.checkpoint import Progress
from trainer.run.checkpoint_writer import BackgroundCheckpointWriter, CheckpointWriter, NullCheckpointWriter
from trainer.run.files import disk_errors_as_user_errors, error_reason
from trainer.run.folder import RunFolder
from trainer.run.lock import LockEvent
from trainer.run.rank_log import RankLog
from trainer.run.record import RunRecord
from trainer.run.resume import load_checkpoint_to_resume
from trainer.run.sessions import SESSIONS_FILE, append_session, describe_environment
from trainer.run.stop import FOLDER_MOVED, StepTimes, StopCheck, StopSignals, find_deadline
from trainer.run.watchdog import NullWatchdog, build_watchdog
from trainer.summary import build_summary, write_final_weights
from trainer.tracking.console import Console, NullConsole
from trainer.tracking.jsonl import JsonLines
from trainer.tracking.logger import MetricLogger
from trainer.tracking.profiler import build_profiler
from trainer.tracking.trackers import build_trackers, wandb_run_id

# Ranks whose launcher was killed need some seconds to save, and another machine's lock a minute to be given up.
_FOLDER_WAIT_SECONDS = 60.0
_FOLDER_POLL_SECONDS = 0.5
_RESULT_BYTES = 1 << 18  # room for the small files of a result
_NO_LAST_CHECKPOINT = "the last checkpoint did not fit on the disk"
# Paths and W&B's variables may differ between machines; all other settings must be the same on all ranks.
_MACHINE_SETTINGS = {"data.root", "data.cache_dir", "run.root", "log.project"}


def train(config: RunConfig, world: World, signals: StopSignals) -> str:
    """Trains until the run ends or is stopped. If it is finished already, prints its result.

    Returns why the run stopped early, or "" if it finished. Raises UserError for errors that the user can fix, and
    PeerError if another rank has died.
    """
    settings = {name: value for name, value in flatten(config).items() if name not in _MACHINE_SETTINGS}
    world.check_equal("settings", settings)
    world.check_equal("precision (train.precision=auto depends on the machine)", world.precision)
    check_ranks(config, world.size)
    folder = RunFolder(config.folder)
    rank_log = RankLog(folder.path, world.rank)
    watchdog = build_watchdog(
        world.rank, world.size, world.attempt_id, config.train.hang_timeout_seconds, folder, rank_log.write, signals
    )
    folder.on_lost = functools.partial(_end_without_folder, folder, signals)
    watchdog.start()
    try:
        _acquire_folder(config, world, folder, watchdog)
        session = Session(config, world, folder, signals, watchdog, rank_log)
        if session.is_finished():
            session.print_result()
            return ""
        with signals.stop_at_step_end(), rank_log:
            return session.run()
    except RuntimeError as error:  # a rank died before Session.run(), which handles this itself
        if lost_peer := watchdog.peer_lost(error):
            raise PeerError(lost_peer) from error
        raise
    finally:
        watchdog.close()
        folder.release()


def _acquire_folder(config: RunConfig, world: World, folder: RunFolder, watchdog: NullWatchdog) -> None:
    """Locks the run folder on rank 0. Waits up to a minute for another process that holds it: perhaps it is saving the
    last checkpoint of a run that was stopped.

    Raises FolderError on every rank, if the folder stays in use, or as RunFolder.try_acquire().
    """
    deadline = time.monotonic() + _FOLDER_WAIT_SECONDS
    is_first = True
    while holder := world.broadcast_from_rank0(lambda: folder.try_acquire(config)):
        if world.broadcast_from_rank0(lambda: time.monotonic() > deadline):
            raise folder.in_use_error(holder)
        if is_first and world.is_rank0:
            print(
                f"samecurve: run folder {folder.path} is in use by {holder}; waiting up to {_FOLDER_WAIT_SECONDS:g} s "
                "for its end",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        is_first = False
        watchdog.heartbeat(0, "start")
        time.sleep(_FOLDER_POLL_SECONDS)


def _end_without_folder(folder: RunFolder, signals: StopSignals, event: LockEvent, detail: str) -> None:
    """Stops the run if its folder was renamed; ends it at once if another process has taken the folder.

    Runs in a thread on rank 0.
    """
    if event == "moved":
        old_path = folder.path
        folder.follow_if_moved()
        print(
            f"samecurve: run folder {old_path} was renamed to {detail} during the run; stopping with a checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        signals.request_stop(FOLDER_MOVED)
        return
    print(
        f"samecurve: {detail} has taken run folder {folder.path}, because this run was suspended or its lock files "
        "were removed; ending without a checkpoint",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)  # two processes must never write to one folder


class Session:
    """Builds and owns the objects of one session. Every rank makes the same calls; only rank 0 writes files."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        folder: RunFolder,
        signals: StopSignals,
        watchdog: NullWatchdog,
        rank_log: RankLog,
    ) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.watchdog, self.rank_log, self.signals = watchdog, rank_log, signals
        self.console = Console(rank_log.write) if world.is_rank0 else NullConsole()
        log = self.console.log
        set_seed(config.run.seed)
        checkpoint = load_checkpoint_to_resume(config, folder, world, log)
        self.progress = checkpoint.progress if checkpoint is not None else Progress(precision=world.precision)
        self.components = build_components(config, world, checkpoint, watchdog, log)
        self.progress.data = self.components.splits.identity.to_json()
        self.metric_logger = MetricLogger(config, self.components, self.progress, self.console)
        self.checkpoint_writer: CheckpointWriter = NullCheckpointWriter()
        self.report_writer = NullReportWriter()
        if world.is_rank0:
            self.checkpoint_writer = BackgroundCheckpointWriter(
                folder, config.checkpoint.keep, self.progress, self.metric_logger.flush, log
            )
            self.report_writer = build_report_writer(folder, config, self.components, self.metric_logger, log)
        self.trainer = self._build_trainer()

    def _build_trainer(self) -> Trainer:
        world, config = self.world, self.config
        skipped_steps, step_times = SkippedSteps(world.device), StepTimes()
        self.stop_check = StopCheck(
            self.signals,
            folder=self.folder.path if world.is_rank0 else None,
            deadline=find_deadline(config.train.time_limit_seconds, self.signals.since) if world.is_rank0 else None,
            step_times=step_times,
            world_size=world.size,
            all_reduce_max=world.all_reduce_max,
            lag_steps=skipped_steps.lag_steps,
        )
        return Trainer(
            config,
            world,
            self.components,
            self.progress,
            console=self.console,
            metric_logger=self.metric_logger,
            checkpoint_writer=self.checkpoint_writer,
            report_writer=self.report_writer,
            watchdog=self.watchdog,
            skipped_steps=skipped_steps,
            step_times=step_times,
            stop_check=self.stop_check,
        )

    def is_finished(self) -> bool:
        """Returns whether all steps are done and the result is written, if need be without the last checkpoint."""
        steps, total_steps = self.progress.step, self.components.durations.total_steps
        if steps < total_steps:
            status = self.world.broadcast_from_rank0(lambda: RunRecord(self.folder.path).status)
            if status.get("state") != "finished" or status.get("reason") != _NO_LAST_CHECKPOINT:
                return False
            steps = total_steps
        summary = self.world.broadcast_from_rank0(lambda: RunRecord(self.folder.path).summary)
        return bool(summary.get("steps") == steps and summary.get("test") and summary.get("train"))

    def print_result(self) -> None:
        """Prints the result of a finished run again."""
        summary = RunRecord(self.folder.path).summary
        self.console.log(
            f"run {self.folder.path} is finished ({summary.get('steps', 0):,} steps); nothing was trained. "
            "To train again, choose another run.name; to train longer, raise train.epochs"
        )
        self.console.log_summary(summary, self.folder.path)

    def run(self) -> str:
        """Trains. Returns why the run stopped early, or "". Writes an error that ends it to status.json."""
        try:
            self._open()
            reason = self.trainer.run()
            if reason:
                self._stop(reason)
            else:
                self._finish()
            return reason
        except BaseException as error:
            lost_peer = self.watchdog.peer_lost(error) or lost_worker(error)
            try:
                # Rank 0 records a failure. If it has died without that, the ranks that are left do.
                if self.world.is_rank0 or (lost_peer.startswith("rank 0") and not self._is_failure_recorded()):
                    self._record_failure(lost_peer or f"{type(error).__name__}: {error}")
            finally:
                with contextlib.suppress(FolderError):  # printed already
                    self._close(failed=True)
            if lost_peer:
                message = f"{lost_peer}; run the same command again to continue from the last checkpoint"
                raise PeerError(message) from error
            raise

    def _open(self) -> None:
        """Writes the first files to the run folder, which train() has locked, and opens the trackers."""
        folder, config, world, step = self.folder, self.config, self.world, self.progress.step
        durations, devices = self.components.durations, world.describe()
        total_steps = durations.total_steps
        environment = describe_environment() | devices | self.components.describe()

        def open_folder() -> None:
            with disk_errors_as_user_errors(f"the run in {folder.path}"):
                folder.write_settings(config, environment)
                sessions = append_session(folder, step, total_steps, world.size)
                self._write_data_identity()
                folder.write_status("running", step)
                # An evaluation after the checkpoint is done again, and logged once.
                self.metric_logger.logged_splits = folder.remove_rows_after(step, self.console.log)
                self.metric_logger.best = RunRecord(folder.path).best
                self.progress.wandb_run_id = wandb_run_id(config, folder, self.progress.wandb_run_id)
                self._reserve_room()
            folder.on_restored = lambda: self._restore_first_files(sessions)
            log, run_id = self.console.log, self.progress.wandb_run_id
            self.metric_logger.bad_steps_file = JsonLines(folder.bad_steps, log)
            self.metric_logger.trackers = build_trackers(config, folder, step, run_id, log)

        world.broadcast_from_rank0(open_folder)
        self.rank_log.on_start(step, world.size, f"{devices['device']} ({world.device})")
        if hosts := world.hosts_where(not folder.path.is_dir()):
            self.console.log(
                f"warning: {folder.path} does not exist on {', '.join(hosts)}; to continue this run later, set "
                "run.root to a folder that all nodes share"
            )
        if jump := describe_changed_length(self.progress.settings, step, config, durations):
            self.console.log(jump)
        self.metric_logger.on_start(world)
        self.trainer.profiler = build_profiler(
            config.train,
            total_steps,
            folder,
            world.rank,
            world.device,
            self.trainer.meter.paused,
            self.console.log if world.is_rank0 else self.rank_log.write,
            self.metric_logger.log_profile if world.is_rank0 else None,
        )
        self.watchdog.heartbeat(step, "waiting for data")

    def _write_data_identity(self) -> None:
        self.folder.write_json(DATA_FILE, self.progress.data)
        self.components.splits.identity.write(self.folder.path)

    def _restore_first_files(self, sessions: bytes) -> None:
        """Writes the files of _open() to a folder that was created again. Runs in the thread that writes checkpoints.

        sessions: the content of starts.jsonl.
        """
        self._write_data_identity()
        self.folder.write_file(SESSIONS_FILE, lambda path: path.write_bytes(sessions))
        wandb_run_id(self.config, self.folder, self.progress.wandb_run_id)
        self._reserve_room()

    def _reserve_room(self) -> None:
        """Keeps room on the disk for the final weights, which must not fail because checkpoints have filled it."""
        num_bytes = sum(tensor.nbytes for tensor in self.components.module.state_dict().values())
        try:
            self.folder.reserve_room(num_bytes + _RESULT_BYTES)
        except OSError as error:
            self.console.log(
                f"no room could be reserved in {self.folder.path} for the final weights, {num_bytes >> 20} MB "
                f"({error_reason(error)})"
            )

    def _stop(self, reason: str) -> None:
        """Saves a checkpoint and sets the status to `stopped`."""
        self.trainer.save_checkpoint()
        self.trainer.wait_for_checkpoint()

        def write_status() -> str:
            self.folder.follow_if_moved()
            with disk_errors_as_user_errors(f"status.json in {self.folder.path}"):
                self.folder.write_status("stopped", self.progress.step, reason)
                self.stop_check.remove_stop_file()
            self.report_writer.on_stop()
            return "" if self.folder.path == self.config.folder else f"rename it back to {self.config.folder}, and "

        advice = self.world.broadcast_from_rank0(write_status)
        self.world.raise_together(self._close)  # all ranks raise: the launcher kills the rest as soon as one exits
        self.console.log(
            f"stopped by {reason} after step {self.progress.step:,}, with a checkpoint in {self.folder.path}; "
            f"{advice}run the same command again to continue"
        )

    def _finish(self) -> None:
        """Writes the final weights and the summary, and prints the result."""
        progress, folder = self.progress, self.folder
        self.watchdog.heartbeat(progress.step, "checkpoint")
        self.world.broadcast_from_rank0(self._write_final_weights)
        self.trainer.wait_for_checkpoint(has_final_weights=True)
        self.watchdog.heartbeat(progress.step, "result")
        samples_per_second = self.trainer.meter.mean_samples_per_second or progress.last_line["samples_per_second"]
        steps_per_epoch = self.components.durations.steps_per_epoch
        summary = build_summary(progress, steps_per_epoch, self.world.size, samples_per_second, self.trainer.results)

        def write_result() -> None:
            with disk_errors_as_user_errors(f"the result in {folder.path}"):
                folder.write_json("summary.json", summary)
                reason = "" if self.checkpoint_writer.is_last_saved else _NO_LAST_CHECKPOINT
                folder.write_status("finished", progress.step, reason)
                self.stop_check.remove_stop_file()
            self.report_writer.write()
            self.metric_logger.log_summary(summary, folder.path / "model.safetensors")

        self.world.broadcast_from_rank0(write_result)
        self.world.raise_together(self._close)
        self.console.log_summary(summary, folder.path)

    def _write_final_weights(self) -> None:
        """Writes model.safetensors. On a full disk, older checkpoints give way."""
        folder = self.folder
        folder.follow_if_moved()
        folder.release_room()
        with disk_errors_as_user_errors(f"model.safetensors in {folder.path}"):
            self.checkpoint_writer.write_with_room(
                lambda: folder.write_file("model.safetensors", lambda path: write_final_weights(path, self.components))
            )

    def _is_failure_recorded(self) -> bool:
        """Returns whether status.json says already that the run failed."""
        try:
            return RunRecord(self.folder.path).status.get("state") == "failed"
        except FolderError:
            return False

    def _record_failure(self, reason: str) -> None:
        """Writes the reason to status.json, the trackers and the report. If that fails, logs it."""
        self.checkpoint_writer.wait()  # let a checkpoint that is being written finish
        try:
            self.folder.write_status("failed", self.progress.step, reason)
        except OSError as error:
            self.console.log(f"status.json cannot be written ({error.strerror})")
        try:
            self.metric_logger.alert("failed", reason)
        finally:
            self.report_writer.on_failure()

    def _close(self, failed: bool = False) -> None:
        """Closes the watchdog, trackers, profiler and console, even if one of them raises."""
        self.watchdog.close()
        with contextlib.ExitStack() as exit_stack:  # closes in reverse order
            exit_stack.callback(self.console.close)
            exit_stack.callback(self.trainer.profiler.close, failed)
            exit_stack.callback(self.metric_logger.close, failed)
