"""The Trainer: runs steps, evaluates, saves, logs, stops. Knows all other rooms."""

import contextlib
import json
from time import perf_counter

from accelerate.utils import set_seed

from trainer import (
    blocks,
    evaluation,
    memory,
    optim,
    parts,
    profiler,
    reporter,
    result,
    resume,
    starts,
    stop,
    stopwatch,
    trackers,
    watch,
)
from trainer import config as configs
from trainer.bad_steps import BadSteps, Skipped
from trainer.checkpoint import Progress, State
from trainer.console import Console, Quiet
from trainer.errors import FolderError, PeerError, TrainingError
from trainer.folder import RunFolder, told
from trainer.journal import Journal
from trainer.meter import Meter
from trainer.profiler import NoProfiler
from trainer.rank_log import RankLog
from trainer.reporter import NoReporter
from trainer.saver import BackgroundSaver, NoSaver, Saver
from trainer.settings import RunConfig
from trainer.step import Shard
from trainer.stop import Signals
from trainer.trackers.lines import JsonLines
from trainer.world import World

# Where things lie may differ from machine to machine; all else must be the same for all ranks.
_OF_A_MACHINE = {"data.root", "data.cache_dir", "run.root"}


def train(config: RunConfig, world: World, signals: Signals) -> str:
    """Trains to the end, or shows the result of a run that has got there already. All is left in the run folder.

    Returns why the run was asked to stop before its end, or nothing.
    """
    settings = {name: value for name, value in configs.flatten(config).items() if name not in _OF_A_MACHINE}
    world.agree("settings", json.dumps(settings))
    world.agree("precision (train.precision=auto depends on the machine)", world.precision)
    configs.check_ranks(config, world.size)
    folder = RunFolder(config.folder)
    log, hang_timeout = RankLog(folder.path, world.rank), config.train.hang_timeout_seconds
    watcher = watch.build(world.rank, world.size, world.meeting, hang_timeout, folder, log.write)
    watcher.start()
    try:
        world.from_first(lambda: folder.check(config))
        trainer = Trainer(config, world, folder, signals, watcher, log)
        if trainer.is_finished():
            trainer.show_finished()
            return ""
        with signals.at_step_ends(), log:
            return trainer.run_or_record_failure()
    except RuntimeError as error:  # before the run has begun
        if lost := watcher.lost(error):
            raise PeerError(lost) from error
        raise
    finally:
        watcher.close()
        folder.release()


class Trainer:
    """One run. Every rank makes the same calls; only what is handed to it differs."""

    def __init__(
        self, config: RunConfig, world: World, folder: RunFolder, signals: Signals, guard: watch.Unwatched, log: RankLog
    ) -> None:
        self.config, self.world, self.folder, self.log = config, world, folder, log
        self.console = Console(log.write) if world.is_first else Quiet()
        self.results: dict[str, evaluation.Evaluation] = {}
        set_seed(config.run.seed)

        saved = resume.find_checkpoint(config, folder, world, self.console.say)
        self.progress = saved.progress if saved is not None else Progress(precision=world.precision)
        self.watch = guard
        self.parts = parts.build(config, world, saved, self.watch, self.console.say)
        self.journal = Journal(config, self.parts, self.progress, self.console)
        self.data_wait = stopwatch.build(world.device)
        shares = {"data_wait_share": self.data_wait, "communication_share": self.parts.step.communication}
        self.meter = Meter(self.progress.window if world.is_first else [0.0] * 3, world.sum, world.device, shares)
        self.profiler = NoProfiler()
        self.saver: Saver = NoSaver()
        self.reporter = NoReporter()
        if world.is_first:
            self.reporter = reporter.build(folder, config, self.parts, self.journal, self.console.say)
            keep = config.checkpoint.keep
            self.saver = BackgroundSaver(folder, keep, self.progress, self.journal.flush, self.console.say)
        self._has_shown_beginning = False
        self.skipped = Skipped(world.device)
        allowed = config.train.max_bad_steps
        self.bad_steps = BadSteps(self.progress, self.parts.batches, allowed, self.journal.warn, world.sum)
        self.pace = stop.Pace()
        self.stop_check = stop.StopCheck(
            signals,
            folder.path if world.is_first else None,
            stop.deadline(config.train.time_limit_seconds, signals.since) if world.is_first else None,
            self.pace,
            world.size,
            world.largest,
            self.skipped.lag_steps,
        )

    def is_finished(self) -> bool:
        """Whether the run has all its steps and its results, so that there is nothing left to do."""
        if self.progress.step < self.parts.durations.total_steps:
            return False
        summary = self.world.from_first(lambda: self.folder.read_json("summary.json"))
        return summary is not None and summary["steps"] == self.progress.step

    def show_finished(self) -> None:
        """Says so, and shows the result again."""
        self.console.say(
            f"run {self.folder.path} is finished ({self.progress.step:,} steps); nothing was trained. "
            "To train again choose another run.name; to train on raise train.epochs"
        )
        self.console.finished(self.folder.read_json("summary.json"), self.folder.path)

    def run_or_record_failure(self) -> str:
        """The run; what ends it early is left in status.json for whoever looks at the folder, then told as ever.

        Returns why it was asked to stop, or nothing.
        """
        try:
            self.begin()
            return self.run()
        except BaseException as error:
            lost = self.watch.lost(error)
            try:
                if self.world.is_first or (lost.startswith("rank 0") and not self._has_told_failure()):
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
            with told(f"the run in {folder.path}"):
                folder.begin(config, devices)
                starts.add(folder, step, self.parts.durations.total_steps, world.size)
                folder.status("running", step)
                # A run killed between its last checkpoint and its results makes these again.
                self.journal.evaluated_before = folder.rewind(step)
                self.progress.wandb_run_id = trackers.wandb_run_id(config, folder, self.progress.wandb_run_id)
            self.journal.bad_steps = JsonLines(folder.bad_steps, self.console.say)
            self.journal.trackers = trackers.build(config, folder, step, self.progress.wandb_run_id, self.console.say)

        world.from_first(open_folder)
        self.log.begins(step, world.size, f"{devices['device']} ({world.device})")
        self.journal.begins(world)
        say, show = (self.console.say, self.journal.profiled) if world.is_first else (self.log.write, None)
        total_steps = self.parts.durations.total_steps
        self.profiler = profiler.build(
            config.train, total_steps, folder, world.rank, world.device, self.meter.paused, say, show
        )
        self.watch.at(step, "waiting for data")

    def run(self) -> str:
        """From the step where the run is to its last, unless it is asked to stop: then returns why."""
        config, progress, durations = self.config, self.progress, self.parts.durations
        first_step, total_steps = progress.step, durations.total_steps
        if too_many := self.bad_steps.too_many_before():
            raise TrainingError(too_many)
        self.journal.start()
        self.meter.start()
        batches = blocks.train_loader(
            self.parts.splits.train,
            self.parts.batches,
            self.parts.augment,
            self.parts.cutting,
            config,
            self.world,
            first_step,
            total_steps,
        )
        began = self._wait_begins()
        for batch in batches:
            self.data_wait.end()
            self.profiler.has_batch()
            self._take_step(batch)
            self.profiler.has_stepped()
            step = progress.step
            self.pace.step(perf_counter() - began)
            last = step == total_steps
            if self._is_told(step):
                self._note_skipped()
                self.journal.training(self.meter)
                self._show_beginning()
            is_best = False
            if last or durations.due(step, config.eval.every_epochs):
                is_best = self._evaluate()
            if last or is_best or durations.due(step, config.checkpoint.every_epochs, config.checkpoint.every_steps):
                self._save()
            self.console.tick(step)
            if reason := "" if last else self._asked_to_stop():
                self._stop(reason)
                return reason
            began = self._wait_begins()
        if not self.results:  # killed between its last checkpoint and its results
            self._evaluate()
        if not progress.last_line:  # stopped before its first line, then made as short as that
            self.journal.training(self.meter)
        self._finish()
        return ""

    def _wait_begins(self) -> float:
        """What comes before each step, and when its batch began to be waited for."""
        step = self.progress.step
        self.watch.at(step, "waiting for data")
        self.profiler.waits(step)
        self.data_wait.begin()
        return perf_counter()

    def _is_told(self, step: int) -> bool:
        """Whether a line of training metrics is due after so many steps."""
        return step == self.parts.durations.total_steps or step % self.config.log.every_steps == 0

    def _take_step(self, batch: list[Shard]) -> None:
        """One optimizer step, or its batch skipped when loss or gradient are not finite."""
        progress, batches, lag_steps = self.progress, self.parts.batches, self.skipped.lag_steps
        step = progress.step
        global_size = batches.size(step)
        optim.set_lr(self.parts.optimizer, self.config.optim, self.parts.schedule.lr_factor(step))
        outcome = self.parts.step(batch, step, batches.epoch(step), global_size, self.parts.num_shards(step))
        self.meter.add(outcome, global_size)
        self.skipped.add(step, outcome)
        if not lag_steps:  # what is heard at once is heard before the step counts
            self._note_skipped()
        progress.step = step + 1
        if lag_steps:
            self._note_skipped(lag_steps)

    def _note_skipped(self, lag_steps: int = 0) -> None:
        """Raises TrainingError when there were too many, with a checkpoint: from before the step, if it is in hand."""
        lines = self.journal.bad_steps
        if too_many := self.bad_steps.note(self.skipped.heard(lag_steps), lines):
            self.bad_steps.note(self.skipped.heard(), lines)
            self._save()
            self._wait_for_save()
            raise TrainingError(too_many)

    def _asked_to_stop(self) -> str:
        step, durations, every = self.progress.step, self.parts.durations, self.config.eval.every_epochs
        self.watch.at(step, "agreement on stopping")
        return self.stop_check(step, self.saver.seconds, lambda steps: durations.due_within(step, steps, every))

    def _stop(self, reason: str) -> None:
        """Leaves a checkpoint, and says why the run is at an end for now."""
        self._save()
        self._wait_for_save()

        def write() -> None:
            with told(f"status.json in {self.folder.path}"):
                self.folder.status("stopped", self.progress.step, reason)
                self.stop_check.done()
            self.reporter.stops()

        self.world.from_first(write)
        self.world.together(self.close)  # together: a launcher ends all as soon as one has left
        self.console.say(
            f"stopped by {reason} after step {self.progress.step:,}, with a checkpoint; "
            f"the same command goes on from there: {self.folder.path}"
        )

    def _show_beginning(self) -> None:
        if not self._has_shown_beginning:
            self._has_shown_beginning = True
            with self.meter.paused():
                self.reporter.begins()

    def _evaluate(self) -> bool:
        """Evaluates on the held-out part, if there is one, and on the test set; whether this is the best so far."""
        progress, splits = self.progress, self.parts.splits
        self._note_skipped()
        with self.meter.paused():
            began = perf_counter()
            self.journal.tell()  # not only when this is done
            memory.give_back()
            for split, part in (("validation", splits.validation), ("test", splits.test)):
                if part is not None:
                    found, predictions = self.parts.evaluate(part, self.config, self.world, self._at_evaluation)
                    self.results[split] = found
                    self.journal.evaluated(split, found)
            self.reporter.evaluated(splits.test, found, predictions, progress.step)  # the test set, which comes last
            memory.give_back()
            self.pace.evaluation(perf_counter() - began)
        return progress.judge({split: found.accuracy for split, found in self.results.items()})

    def _at_evaluation(self) -> None:
        self.watch.at(self.progress.step, "evaluation")

    def _save(self) -> None:
        """A checkpoint by rank 0, written while training goes on."""
        progress, scaler = self.progress, self.world.accelerator.scaler
        self.watch.at(progress.step, "checkpoint")
        self._note_skipped()
        with self.meter.paused():
            self.journal.saves()
            progress.window = self.meter.total()
            progress.settings = configs.flatten(self.config)
            best_step = progress.best.step if progress.best and progress.best.split == "validation" else None
            scale = scaler.state_dict() if scaler else {}
            module, optimizer, about = self.parts.module, self.parts.optimizer, self.parts.about
            state = State(module.state_dict(), optimizer.state_dict(), scale, progress, about.metadata())
            self.saver.save(state, best_step)

    def _wait_for_save(self) -> None:
        """Raises FolderError on all ranks when the last checkpoint could not be written."""
        self.world.together(self.saver.finish)

    def _finish(self) -> None:
        """The weights, the summary, the table."""
        progress, folder = self.progress, self.folder
        self._wait_for_save()
        self.watch.at(progress.step, "result")
        rate = self.meter.mean_samples_per_second or progress.last_line["samples_per_second"]
        summary = result.summary(progress, self.parts.durations.steps_per_epoch, self.world.size, rate, self.results)

        def write() -> None:
            with told(f"the result in {folder.path}"):
                folder.write_file("model.safetensors", lambda path: result.write_weights(path, self.parts))
                folder.write_json("summary.json", summary)
                folder.status("finished", progress.step)
                self.stop_check.done()
            self.reporter.write()
            self.journal.finished(summary, folder.path / "model.safetensors")

        self.world.from_first(write)
        self.world.together(self.close)
        self.console.finished(summary, self.folder.path)

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
            self.console.say(f"status.json could not be written ({error.strerror})")
        try:
            self.journal.alert("failed", reason)
        finally:
            self.reporter.fails()

    def close(self, failed: bool = False) -> None:
        """Closes the trackers and takes the progress bar down, whatever one of them raises."""
        self.watch.close()
        with contextlib.ExitStack() as closing:  # the last one is closed first
            closing.callback(self.console.close)
            closing.callback(self.profiler.close, failed)
            closing.callback(self.journal.close, failed)
