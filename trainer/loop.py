"""The training loop: takes steps, and logs, evaluates and saves when due. It stops early on request."""

from collections.abc import Iterator
from time import perf_counter

from trainer import memory
from trainer.build import Components
from trainer.config.load import flatten
from trainer.config.schema import RunConfig
from trainer.data.loader import Shard, train_loader
from trainer.distributed.world import World
from trainer.errors import TrainingError
from trainer.inference.evaluation import Evaluation
from trainer.nonfinite import NonFiniteGuard, SkippedSteps
from trainer.optim.optimizers import set_learning_rates
from trainer.report.writer import NullReportWriter
from trainer.run.checkpoint import Progress, TrainingState
from trainer.run.checkpoint_writer import CheckpointWriter
from trainer.run.stop import StepTimes, StopCheck, StopWhileWaiting
from trainer.run.watchdog import NullWatchdog
from trainer.timer import build_timer
from trainer.tracking.console import NullConsole
from trainer.tracking.logger import MetricLogger
from trainer.tracking.meter import Meter
from trainer.tracking.profiler import NullProfiler


class Trainer:
    """The training loop of one session, which is one start of a run.

    Every rank makes the same calls. Ranks other than 0 get Null objects in place of those that write files.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        components: Components,
        progress: Progress,
        console: NullConsole,
        metric_logger: MetricLogger,
        checkpoint_writer: CheckpointWriter,
        report_writer: NullReportWriter,
        watchdog: NullWatchdog,
        skipped_steps: SkippedSteps,
        step_times: StepTimes,
        stop_check: StopCheck,
    ) -> None:
        """step_times: shared with stop_check."""
        self.config, self.world, self.components, self.progress = config, world, components, progress
        self.console, self.metric_logger = console, metric_logger
        self.checkpoint_writer, self.report_writer, self.watchdog = checkpoint_writer, report_writer, watchdog
        self.skipped_steps, self.step_times, self.stop_check = skipped_steps, step_times, stop_check
        self.data_wait = build_timer(world.device)
        timers = {"data_wait_share": self.data_wait, "communication_share": components.step.communication}
        window = progress.window if world.is_rank0 else [0.0] * 3
        self.meter = Meter(window, world.all_reduce_sum, world.device, timers)
        self.nonfinite_guard = NonFiniteGuard(
            progress, components.batches, config.train.max_bad_steps, metric_logger.warn, world.all_reduce_sum
        )
        self.profiler = NullProfiler()
        self.results: dict[str, Evaluation] = {}
        """the last evaluation of each split in this session"""
        self._has_written_report = False

    def run(self) -> str:
        """Trains to the last step or until a stop is requested. Returns why it stopped, or "" after the last step.

        Raises TrainingError when more steps were skipped than train.max_bad_steps allows.
        """
        if error := self.nonfinite_guard.limit_error():
            raise TrainingError(error)
        self.metric_logger.start()
        self.meter.start()
        try:
            return self._take_steps()
        except StopWhileWaiting as stop:
            return str(stop)

    def _take_steps(self) -> str:
        """Does the work of run()."""
        total_steps = self.components.durations.total_steps
        step_start = self._before_batch()
        for shards in self._batches():
            self.data_wait.end()
            self.profiler.after_batch()
            self._take_step(shards)
            self.profiler.after_step()
            self.step_times.record_step(perf_counter() - step_start)
            self._after_step()
            is_last = self.progress.step == total_steps
            if not is_last and (reason := self._stop_reason()):
                return reason
            step_start = self._before_batch()
        if not self.results:  # resumed from the last step's checkpoint, before its results were written
            self._evaluate()
        if not self.progress.last_line:  # stopped before its first row; then train.epochs was lowered to the steps done
            self.metric_logger.log_training(self.meter)
        return ""

    def _batches(self) -> Iterator[list[Shard]]:
        components = self.components
        return train_loader(
            components.splits.train,
            components.batches,
            components.augment,
            components.shard_layout,
            self.config,
            self.world,
            self.progress.step,
            components.durations.total_steps,
        )

    def _before_batch(self) -> float:
        """Starts the wait for the next batch. Returns its start, in seconds of perf_counter()."""
        self.watchdog.heartbeat(self.progress.step, "waiting for data")
        self.profiler.before_batch(self.progress.step)
        self.data_wait.begin()
        return perf_counter()

    def _take_step(self, shards: list[Shard]) -> None:
        """Takes one optimizer step, or skips it when the loss or the gradient is not finite."""
        components, step = self.components, self.progress.step
        global_size = components.batches.batch_size(step)
        set_learning_rates(components.optimizer, self.config.optim, components.schedule.lr_factor(step))
        outcome = components.step(
            shards, step, components.batches.epoch_of(step), global_size, components.num_shards(step)
        )
        self.meter.add(outcome, global_size)
        self.skipped_steps.add(step, outcome)
        lag_steps = self.skipped_steps.lag_steps
        if not lag_steps:  # before progress.step moves: the checkpoint of a failed run must not contain this step
            self._record_skipped_steps()
        self.progress.step = step + 1
        if lag_steps:
            self._record_skipped_steps(lag_steps)

    def _after_step(self) -> None:
        """Logs, evaluates and saves when due."""
        step, durations, checkpoint = self.progress.step, self.components.durations, self.config.checkpoint
        is_last = step == durations.total_steps
        if is_last or step % self.config.log.every_steps == 0:
            self._record_skipped_steps()
            self.metric_logger.log_training(self.meter)
            self._write_first_report()
        is_best = False
        if is_last or durations.is_due(step, self.config.eval.every_epochs):
            is_best = self._evaluate()
        if is_last or is_best or durations.is_due(step, checkpoint.every_epochs, checkpoint.every_steps):
            self.save_checkpoint()
        self.console.update(step)

    def _stop_reason(self) -> str:
        step, durations, every_epochs = self.progress.step, self.components.durations, self.config.eval.every_epochs
        self.watchdog.heartbeat(step, "agreement on stopping")
        return self.stop_check(
            step,
            self.checkpoint_writer.slowest_save_seconds,
            lambda steps: durations.is_due_within(step, steps, every_epochs),
        )

    def _record_skipped_steps(self, lag_steps: int = 0) -> None:
        """Records the skipped steps, but not those among the last lag_steps steps.

        Raises TrainingError if too many steps were skipped, after saving a checkpoint. Without a lag that checkpoint is
        from before the last of them.
        """
        bad_steps_file = self.metric_logger.bad_steps_file
        if error := self.nonfinite_guard.record(self.skipped_steps.pop_skipped(lag_steps), bad_steps_file):
            # Records the remaining ones too. Their error would say the same.
            self.nonfinite_guard.record(self.skipped_steps.pop_skipped(), bad_steps_file)
            self.save_checkpoint()
            self.wait_for_checkpoint()
            raise TrainingError(error)

    def _write_first_report(self) -> None:
        if not self._has_written_report:
            self._has_written_report = True
            with self.meter.paused():
                self.report_writer.on_start()

    def _evaluate(self) -> bool:
        """Evaluates on the validation split, if there is one, and on the test split. Returns whether the
        validation accuracy is the best so far.
        """
        splits = self.components.splits
        self._record_skipped_steps()
        with self.meter.paused():
            start = perf_counter()
            self.metric_logger.flush_rows()  # before the evaluation, which may take long
            memory.release_freed_memory()
            for name, split in (("validation", splits.validation), ("test", splits.test)):
                if split is not None:
                    evaluation, predictions = self.components.evaluate(
                        split, self.config, self.world, self._evaluation_heartbeat
                    )
                    self.results[name] = evaluation
                    self.metric_logger.log_evaluation(name, evaluation)
            # These are the evaluation and predictions of the test split, which comes last.
            self.report_writer.on_evaluation(splits.test, evaluation, predictions, self.progress.step)
            memory.release_freed_memory()
            self.step_times.record_evaluation(perf_counter() - start)
        return self.progress.record_evaluation({name: result.accuracy for name, result in self.results.items()})

    def _evaluation_heartbeat(self) -> None:
        self.watchdog.heartbeat(self.progress.step, "evaluation")

    def save_checkpoint(self) -> None:
        """Copies the training state, which rank 0 writes while training continues. Call it on every rank."""
        progress, components, scaler = self.progress, self.components, self.world.accelerator.scaler
        self.watchdog.heartbeat(progress.step, "checkpoint")
        self._record_skipped_steps()
        with self.meter.paused():
            self.metric_logger.before_checkpoint()
            progress.window = self.meter.window_sums()
            progress.settings = flatten(self.config)
            best_step = progress.best.step if progress.best and progress.best.split == "validation" else None
            state = TrainingState(
                components.module.state_dict(),
                components.optimizer.state_dict(),
                scaler.state_dict() if scaler else {},
                progress,
                components.model_metadata.to_file_metadata(),
            )
            self.checkpoint_writer.save(state, best_step)

    def wait_for_checkpoint(self, has_final_weights: bool = False) -> None:
        """Waits for the last checkpoint. Raises FolderError on all ranks when it could not be written.

        has_final_weights: model.safetensors is written.
        """
        self.world.raise_together(lambda: self.checkpoint_writer.finish(has_final_weights))
