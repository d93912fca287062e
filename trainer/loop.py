"""The Trainer: runs steps, evaluates, saves, logs, stops. Knows all other rooms."""

import contextlib
import json
from time import perf_counter

from accelerate.utils import set_seed

from trainer import memory
from trainer.build import build_components
from trainer.config.load import flatten
from trainer.config.schema import RunConfig
from trainer.config.validate import check_ranks
from trainer.data.loader import Shard, train_loader
from trainer.distributed.world import World
from trainer.errors import FolderError, PeerError, TrainingError
from trainer.inference.evaluation import Evaluation
from trainer.nonfinite import NonFiniteGuard, SkippedSteps
from trainer.optim.optimizers import set_learning_rates
from trainer.report.writer import NullReportWriter, build_report_writer
from trainer.run import stop
from trainer.run.checkpoint import Progress, TrainingState
from trainer.run.checkpoint_writer import BackgroundCheckpointWriter, CheckpointWriter, NullCheckpointWriter
from trainer.run.files import disk_errors_as_user_errors
from trainer.run.folder import RunFolder
from trainer.run.rank_log import RankLog
from trainer.run.resume import load_checkpoint_to_resume
from trainer.run.sessions import append_session, describe_environment
from trainer.run.stop import StopSignals
from trainer.run.watchdog import NullWatchdog, build_watchdog
from trainer.summary import build_summary, write_final_weights
from trainer.timer import build_timer
from trainer.tracking.console import Console, NullConsole
from trainer.tracking.jsonl import JsonLines
from trainer.tracking.logger import MetricLogger
from trainer.tracking.meter import Meter
from trainer.tracking.profiler import NullProfiler, build_profiler
from trainer.tracking.trackers import build_trackers, wandb_run_id

# Where things lie may differ from machine to machine; all else must be the same for all ranks.
_OF_A_MACHINE = {"data.root", "data.cache_dir", "run.root"}


def train(config: RunConfig, world: World, signals: StopSignals) -> str:
    """Trains to the end, or shows the result of a run that has got there already. All is left in the run folder.

    Returns why the run was asked to stop before its end, or nothing.
    """
    settings = {name: value for name, value in flatten(config).items() if name not in _OF_A_MACHINE}
    world.check_equal("settings", json.dumps(settings))
    world.check_equal("precision (train.precision=auto depends on the machine)", world.precision)
    check_ranks(config, world.size)
    folder = RunFolder(config.folder)
    rank_log, hang_timeout = RankLog(folder.path, world.rank), config.train.hang_timeout_seconds
    watcher = build_watchdog(world.rank, world.size, world.attempt_id, hang_timeout, folder, rank_log.write)
    watcher.start()
    try:
        world.broadcast_from_rank0(lambda: folder.check(config))
        trainer = Trainer(config, world, folder, signals, watcher, rank_log)
        if trainer.is_finished():
            trainer.show_finished()
            return ""
        with signals.at_step_ends(), rank_log:
            return trainer.run_or_record_failure()
    except RuntimeError as error:  # before the run has begun
        if lost := watcher.peer_lost(error):
            raise PeerError(lost) from error
        raise
    finally:
        watcher.close()
        folder.release()


class Trainer:
    """One run. Every rank makes the same calls; only what is handed to it differs."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        folder: RunFolder,
        signals: StopSignals,
        guard: NullWatchdog,
        rank_log: RankLog,
    ) -> None:
        self.config, self.world, self.folder, self.rank_log = config, world, folder, rank_log
        self.console = Console(rank_log.write) if world.is_rank0 else NullConsole()
        self.results: dict[str, Evaluation] = {}
        set_seed(config.run.seed)

        saved = load_checkpoint_to_resume(config, folder, world, self.console.log)
        self.progress = saved.progress if saved is not None else Progress(precision=world.precision)
        self.watchdog = guard
        self.components = build_components(config, world, saved, self.watchdog, self.console.log)
        self.metric_logger = MetricLogger(config, self.components, self.progress, self.console)
        self.data_wait = build_timer(world.device)
        shares = {"data_wait_share": self.data_wait, "communication_share": self.components.step.communication}
        self.meter = Meter(
            self.progress.window if world.is_rank0 else [0.0] * 3, world.all_reduce_sum, world.device, shares
        )
        self.profiler = NullProfiler()
        self.saver: CheckpointWriter = NullCheckpointWriter()
        self.report_writer = NullReportWriter()
        if world.is_rank0:
            self.report_writer = build_report_writer(
                folder, config, self.components, self.metric_logger, self.console.log
            )
            keep = config.checkpoint.keep
            self.saver = BackgroundCheckpointWriter(
                folder, keep, self.progress, self.metric_logger.flush, self.console.log
            )
        self._has_shown_beginning = False
        self.skipped = SkippedSteps(world.device)
        allowed = config.train.max_bad_steps
        self.bad_steps = NonFiniteGuard(
            self.progress, self.components.batches, allowed, self.metric_logger.warn, world.all_reduce_sum
        )
        self.pace = stop.StepTimes()
        self.stop_check = stop.StopCheck(
            signals,
            folder.path if world.is_rank0 else None,
            stop.deadline(config.train.time_limit_seconds, signals.since) if world.is_rank0 else None,
            self.pace,
            world.size,
            world.all_reduce_max,
            self.skipped.lag_steps,
        )

    def is_finished(self) -> bool:
        """Whether the run has all its steps and its results, so that there is nothing left to do."""
        if self.progress.step < self.components.durations.total_steps:
            return False
        summary = self.world.broadcast_from_rank0(lambda: self.folder.read_json("summary.json"))
        return summary is not None and summary["steps"] == self.progress.step

    def show_finished(self) -> None:
        """Says so, and shows the result again."""
        self.console.log(
            f"run {self.folder.path} is finished ({self.progress.step:,} steps); nothing was trained. "
            "To train again choose another run.name; to train on raise train.epochs"
        )
        self.console.log_summary(self.folder.read_json("summary.json"), self.folder.path)

    def run_or_record_failure(self) -> str:
        """The run; what ends it early is left in status.json for whoever looks at the folder, then told as ever.

        Returns why it was asked to stop, or nothing.
        """
        try:
            self.begin()
            return self.run()
        except BaseException as error:
            lost = self.watchdog.peer_lost(error)
            try:
                if self.world.is_rank0 or (lost.startswith("rank 0") and not self._has_told_failure()):
                    self._record_failure(lost or f"{type(error).__name__}: {error}")
            finally:
                with contextlib.suppress(FolderError):  # told when it happened
                    self.close(failed=True)
            if lost:
                raise PeerError(f"{lost}; the same command goes on from the last checkpoint") from error
            raise

    def begin(self) -> None:
        """Opens the run folder and the trackers; from here on the folder is this run's."""
        folder, config, world, step = self.folder, self.config, self.world, self.progress.step
        devices = world.describe()

        def open_folder() -> None:
            with disk_errors_as_user_errors(f"the run in {folder.path}"):
                folder.begin(config, describe_environment() | devices)
                append_session(folder, step, self.components.durations.total_steps, world.size)
                folder.status("running", step)
                # A run killed between its last checkpoint and its results makes these again.
                self.metric_logger.evaluated_before = folder.rewind(step)
                self.progress.wandb_run_id = wandb_run_id(config, folder, self.progress.wandb_run_id)
            self.metric_logger.bad_steps = JsonLines(folder.bad_steps, self.console.log)
            self.metric_logger.trackers = build_trackers(
                config, folder, step, self.progress.wandb_run_id, self.console.log
            )

        world.broadcast_from_rank0(open_folder)
        self.rank_log.on_start(step, world.size, f"{devices['device']} ({world.device})")
        self.metric_logger.on_start(world)
        log, show = (
            (self.console.log, self.metric_logger.log_profile) if world.is_rank0 else (self.rank_log.write, None)
        )
        total_steps = self.components.durations.total_steps
        self.profiler = build_profiler(
            config.train, total_steps, folder, world.rank, world.device, self.meter.paused, log, show
        )
        self.watchdog.heartbeat(step, "waiting for data")

    def run(self) -> str:
        """From the step where the run is to its last, unless it is asked to stop: then returns why."""
        config, progress, durations = self.config, self.progress, self.components.durations
        first_step, total_steps = progress.step, durations.total_steps
        if too_many := self.bad_steps.too_many_before():
            raise TrainingError(too_many)
        self.metric_logger.start()
        self.meter.start()
        batches = train_loader(
            self.components.splits.train,
            self.components.batches,
            self.components.augment,
            self.components.shard_layout,
            config,
            self.world,
            first_step,
            total_steps,
        )
        began = self._wait_begins()
        for batch in batches:
            self.data_wait.end()
            self.profiler.after_batch()
            self._take_step(batch)
            self.profiler.after_step()
            step = progress.step
            self.pace.step(perf_counter() - began)
            last = step == total_steps
            if self._should_log(step):
                self._note_skipped()
                self.metric_logger.log_training(self.meter)
                self._show_beginning()
            is_best = False
            if last or durations.due(step, config.eval.every_epochs):
                is_best = self._evaluate()
            if last or is_best or durations.due(step, config.checkpoint.every_epochs, config.checkpoint.every_steps):
                self._save()
            self.console.update(step)
            if reason := "" if last else self._asked_to_stop():
                self._stop(reason)
                return reason
            began = self._wait_begins()
        if not self.results:  # killed between its last checkpoint and its results
            self._evaluate()
        if not progress.last_line:  # stopped before its first line, then made as short as that
            self.metric_logger.log_training(self.meter)
        self._finish()
        return ""

    def _wait_begins(self) -> float:
        """What comes before each step, and when its batch began to be waited for."""
        step = self.progress.step
        self.watchdog.heartbeat(step, "waiting for data")
        self.profiler.before_batch(step)
        self.data_wait.begin()
        return perf_counter()

    def _should_log(self, step: int) -> bool:
        """Whether a line of training metrics is due after so many steps."""
        return step == self.components.durations.total_steps or step % self.config.log.every_steps == 0

    def _take_step(self, batch: list[Shard]) -> None:
        """One optimizer step, or its batch skipped when loss or gradient are not finite."""
        progress, batches, lag_steps = self.progress, self.components.batches, self.skipped.lag_steps
        step = progress.step
        global_size = batches.size(step)
        set_learning_rates(self.components.optimizer, self.config.optim, self.components.schedule.lr_factor(step))
        outcome = self.components.step(batch, step, batches.epoch(step), global_size, self.components.num_shards(step))
        self.meter.add(outcome, global_size)
        self.skipped.add(step, outcome)
        if not lag_steps:  # what is heard at once is heard before the step counts
            self._note_skipped()
        progress.step = step + 1
        if lag_steps:
            self._note_skipped(lag_steps)

    def _note_skipped(self, lag_steps: int = 0) -> None:
        """Raises TrainingError when there were too many, with a checkpoint: from before the step, if it is in hand."""
        lines = self.metric_logger.bad_steps
        if too_many := self.bad_steps.note(self.skipped.heard(lag_steps), lines):
            self.bad_steps.note(self.skipped.heard(), lines)
            self._save()
            self._wait_for_save()
            raise TrainingError(too_many)

    def _asked_to_stop(self) -> str:
        step, durations, every = self.progress.step, self.components.durations, self.config.eval.every_epochs
        self.watchdog.heartbeat(step, "agreement on stopping")
        return self.stop_check(step, self.saver.seconds, lambda steps: durations.due_within(step, steps, every))

    def _stop(self, reason: str) -> None:
        """Leaves a checkpoint, and says why the run is at an end for now."""
        self._save()
        self._wait_for_save()

        def write() -> None:
            with disk_errors_as_user_errors(f"status.json in {self.folder.path}"):
                self.folder.status("stopped", self.progress.step, reason)
                self.stop_check.done()
            self.report_writer.on_stop()

        self.world.broadcast_from_rank0(write)
        self.world.raise_together(self.close)  # together: a launcher ends all as soon as one has left
        self.console.log(
            f"stopped by {reason} after step {self.progress.step:,}, with a checkpoint; "
            f"the same command goes on from there: {self.folder.path}"
        )

    def _show_beginning(self) -> None:
        if not self._has_shown_beginning:
            self._has_shown_beginning = True
            with self.meter.paused():
                self.report_writer.on_start()

    def _evaluate(self) -> bool:
        """Evaluates on the held-out part, if there is one, and on the test set; whether this is the best so far."""
        progress, splits = self.progress, self.components.splits
        self._note_skipped()
        with self.meter.paused():
            began = perf_counter()
            self.metric_logger.flush_rows()  # not only when this is done
            memory.give_back()
            for split, part in (("validation", splits.validation), ("test", splits.test)):
                if part is not None:
                    found, predictions = self.components.evaluate(part, self.config, self.world, self._at_evaluation)
                    self.results[split] = found
                    self.metric_logger.log_evaluation(split, found)
            self.report_writer.on_evaluation(
                splits.test, found, predictions, progress.step
            )  # the test set, which comes last
            memory.give_back()
            self.pace.evaluation(perf_counter() - began)
        return progress.judge({split: found.accuracy for split, found in self.results.items()})

    def _at_evaluation(self) -> None:
        self.watchdog.heartbeat(self.progress.step, "evaluation")

    def _save(self) -> None:
        """A checkpoint by rank 0, written while training goes on."""
        progress, scaler = self.progress, self.world.accelerator.scaler
        self.watchdog.heartbeat(progress.step, "checkpoint")
        self._note_skipped()
        with self.meter.paused():
            self.metric_logger.before_checkpoint()
            progress.window = self.meter.total()
            progress.settings = flatten(self.config)
            best_step = progress.best.step if progress.best and progress.best.split == "validation" else None
            scale = scaler.state_dict() if scaler else {}
            module, optimizer, about = self.components.module, self.components.optimizer, self.components.about
            state = TrainingState(module.state_dict(), optimizer.state_dict(), scale, progress, about.metadata())
            self.saver.save(state, best_step)

    def _wait_for_save(self) -> None:
        """Raises FolderError on all ranks when the last checkpoint could not be written."""
        self.world.raise_together(self.saver.finish)

    def _finish(self) -> None:
        """The weights, the summary, the table."""
        progress, folder = self.progress, self.folder
        self._wait_for_save()
        self.watchdog.heartbeat(progress.step, "result")
        rate = self.meter.mean_samples_per_second or progress.last_line["samples_per_second"]
        summary = build_summary(
            progress, self.components.durations.steps_per_epoch, self.world.size, rate, self.results
        )

        def write() -> None:
            with disk_errors_as_user_errors(f"the result in {folder.path}"):
                folder.write_file("model.safetensors", lambda path: write_final_weights(path, self.components))
                folder.write_json("summary.json", summary)
                folder.status("finished", progress.step)
                self.stop_check.done()
            self.report_writer.write()
            self.metric_logger.log_summary(summary, folder.path / "model.safetensors")

        self.world.broadcast_from_rank0(write)
        self.world.raise_together(self.close)
        self.console.log_summary(summary, self.folder.path)

    def _has_told_failure(self) -> bool:
        """Whether rank 0 has said why it leaves; if it could not, any other rank says that it is gone."""
        try:
            found = self.folder.read_json("status.json")
        except (OSError, ValueError):
            return False
        return found is not None and found.get("state") == "failed"

    def _record_failure(self, reason: str) -> None:
        """Leaves the reason where status.json is looked at; a folder that cannot be written any more is left alone."""
        self.saver.wait()  # what is being written still counts
        try:
            self.folder.status("failed", self.progress.step, reason)
        except OSError as error:
            self.console.log(f"status.json could not be written ({error.strerror})")
        try:
            self.metric_logger.alert("failed", reason)
        finally:
            self.report_writer.on_failure()

    def close(self, failed: bool = False) -> None:
        """Closes the trackers and takes the progress bar down, whatever one of them raises."""
        self.watchdog.close()
        with contextlib.ExitStack() as closing:  # the last one is closed first
            closing.callback(self.console.close)
            closing.callback(self.profiler.close, failed)
            closing.callback(self.metric_logger.close, failed)
