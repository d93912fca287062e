"""The Trainer: builds the parts, prepares them once, runs steps, evaluates, saves, logs. Knows all other rooms."""

import copy
import json
from time import perf_counter

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file

from trainer import augment, checkpoint, data, evaluation, losses, models, optim, result, resume, trackers
from trainer.checkpoint import Best, Progress, Saved
from trainer.config import flatten
from trainer.console import Console, Quiet
from trainer.errors import DataError
from trainer.folder import RunFolder, told
from trainer.meter import Meter
from trainer.sampler import GlobalBatches
from trainer.settings import RunConfig
from trainer.step import Step
from trainer.world import World

# Where things lie may differ from machine to machine; all else must be the same for all ranks.
_OF_A_MACHINE = {"data.root", "data.cache_dir", "run.root"}


def train(config: RunConfig, world: World) -> None:
    """Trains to the end, or shows the result of a run that has got there already. All is left in the run folder."""
    settings = {name: value for name, value in flatten(config).items() if name not in _OF_A_MACHINE}
    world.agree("settings", json.dumps(settings))
    folder = RunFolder(config.folder)
    try:
        world.from_first(lambda: folder.check(config))
        trainer = Trainer(config, world, folder)
        if trainer.is_finished():
            trainer.show_finished()
        else:
            trainer.run_or_record_failure()
    finally:
        folder.release()


class Trainer:
    """One run. Every rank makes the same calls; only what is handed to it differs."""

    def __init__(self, config: RunConfig, world: World, folder: RunFolder) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.console = Console() if world.is_first else Quiet()
        self.trackers: list[trackers.Tracker] = [trackers.Silent()]
        self.results: dict[str, evaluation.Evaluation] = {}
        set_seed(config.run.seed)

        splits = data.load(config.data, config.run.seed, world)
        for line in splits.notes:
            self.console.say(line)
        self.classes = splits.classes
        self.normalization = augment.normalization(config.data.normalize, splits.train.images)
        self.augment = augment.Augment(config.data, self.normalization, config.run.seed, world.device)
        self.splits = data.on_device(splits, config.data, world)
        shuffle, drop_last = config.data.shuffle, config.data.drop_last
        self.batches = GlobalBatches(
            len(splits.train), config.data.global_batch_size, config.run.seed, shuffle, drop_last
        )
        self.durations = optim.durations(config, self.batches.steps_per_epoch)
        self.schedule = optim.Schedule(config.schedule.name, self.durations.warmup_steps, self.durations.total_steps)

        saved = resume.find_checkpoint(config, folder, world, self.console.say)
        self.progress = saved.progress if saved is not None else Progress()
        self._build_model(saved)
        sums = self.progress.window if world.is_first else [0.0, 0.0]
        self.meter = Meter(sums, self.progress.window_samples, world.sum, world.device)

    def _build_model(self, saved: Saved | None) -> None:
        """The network and its optimizer, from a checkpoint if there is one, then prepared once."""
        config, accelerator = self.config, self.world.accelerator
        channels, image_size = self.splits.train.images.shape[1:3]
        self.module = self.world.together(lambda: models.build(config.model, len(self.classes), channels, image_size))
        self.world.together(lambda: self._check_smallest_slice((channels, image_size, image_size)))
        self.module.to(self.world.device)
        optimizer = optim.OPTIMIZERS[config.optim.name](self.module.parameters(), config.optim)
        if saved is not None:
            self.module.load_state_dict(saved.model)
            optimizer.load_state_dict(saved.optimizer["optimizer"])
        if config.train.compile:
            self.module.compile()
        model, self.optimizer = accelerator.prepare(self.module, optimizer)
        if saved is not None and accelerator.scaler is not None and saved.optimizer["scaler"]:
            accelerator.scaler.load_state_dict(saved.optimizer["scaler"])
        loss, clip_grad_norm = losses.build(config.loss, training=True), config.train.clip_grad_norm
        self.step = Step(accelerator, model, self.optimizer, loss, self.augment.train, config.run.seed, clip_grad_norm)

    def _check_smallest_slice(self, shape: tuple[int, int, int]) -> None:
        """Raises DataError when a slice is one sample and a BatchNorm layer would see one value a channel of it."""
        batches = self.batches
        sizes = {batches.size(0), batches.size(batches.steps_per_epoch - 1)}
        if not any(size // self.world.size == 1 or size < self.world.size for size in sizes):
            return
        try:
            copy.deepcopy(self.module)(torch.zeros(1, *shape))
        except ValueError as error:
            raise DataError(
                f"batches of {' and '.join(map(str, sorted(sizes)))} samples leave one of {self.world.size} ranks a "
                f"single one, which {self.config.model.name} cannot normalize ({error}); "
                "change data.global_batch_size, or set data.drop_last=true"
            ) from None

    def is_finished(self) -> bool:
        """Whether the run has all its steps and its results, so that there is nothing left to do."""
        if self.progress.step < self.durations.total_steps:
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

    def run_or_record_failure(self) -> None:
        """The run; what ends it early is left in status.json for whoever looks at the folder, then told as ever."""
        failed = True
        try:
            self.begin()
            self.run()
            failed = False
        except BaseException as error:
            self._record_failure(error)
            raise
        finally:
            self.close(failed)

    def begin(self) -> None:
        """Opens the run folder and the trackers; from here on the folder is this run's."""
        folder, config, world, step = self.folder, self.config, self.world, self.progress.step
        total_steps = self.durations.total_steps
        devices = world.describe()

        def open_folder() -> None:
            folder.begin(config, devices)
            folder.status("running", step)
            # A run killed between its last checkpoint and its results makes these again.
            folder.rewind_metrics(step, evaluate_again=step == total_steps)
            self.trackers = trackers.build(config, folder, step, self.console.say)

        world.from_first(open_folder)
        weights = sum(parameter.numel() for parameter in self.module.parameters())
        self.console.say(
            f"{'going on with' if step else 'training'} {config.run.name}: {config.model.name}, {weights:,} weights; "
            f"{config.data.name}, {len(self.splits.train):,} images; {world.size} x {world.device.type}, "
            f"{world.threads} threads each, {world.precision}; global batch {config.data.global_batch_size:,}; "
            f"step {step:,} of {total_steps:,}, {self.durations.steps_per_epoch:,} an epoch"
        )
        self.console.start(step, total_steps)

    def run(self) -> None:
        """From the step where the run is to its last."""
        config, progress, batches, durations = self.config, self.progress, self.batches, self.durations
        first_step, total_steps = progress.step, durations.total_steps
        self._seconds_before, self._started = progress.seconds, perf_counter()
        self.meter.start()
        for batch in data.train_loader(self.splits.train, batches, config.data, self.world, first_step, total_steps):
            step = progress.step
            global_size = batches.size(step)
            optim.set_lr(self.optimizer, config.optim.lr * self.schedule.lr_factor(step))
            self.meter.add(self.step(batch, step, batches.epoch(step), global_size), global_size)
            progress.step = step = step + 1
            last = step == total_steps
            if last or step % config.log.every_steps == 0:
                self._log_training()
            is_best = False
            if last or durations.due(step, config.eval.every_epochs):
                is_best = self._evaluate()
            if last or is_best or durations.due(step, config.checkpoint.every_epochs, config.checkpoint.every_steps):
                self._save()
            self.console.tick(step)
        if not self.results:  # killed between its last checkpoint and its results
            self._evaluate()
        self._finish()

    def _position(self) -> dict[str, float]:
        """Where the run is, as every row tells it."""
        step = self.progress.step
        self.progress.seconds = self._seconds_before + perf_counter() - self._started
        return {
            "epoch": step / self.durations.steps_per_epoch,
            "samples": self.batches.samples_before(step),
            "seconds": self.progress.seconds,
        }

    def _log(self, split: str, scalars: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(split, scalars, self.progress.step)

    def _log_training(self) -> None:
        """A line on the steps since the last one. The only place where their values leave the device."""
        step = self.progress.step
        values = self.meter.read()
        lr = self.config.optim.lr * self.schedule.lr_factor(step - 1)
        line = self.progress.last_line = self._position() | values | {"lr": lr}
        self._log("train", line)
        left = self.batches.samples_before(self.durations.total_steps) - self.batches.samples_before(step)
        self.console.training(step, line, left / values["samples_per_second"])

    def _evaluate(self) -> bool:
        """Evaluates on the held-out part, if there is one, and on the test set; whether this is the best so far."""
        progress = self.progress
        with self.meter.paused():
            self.world.average_buffers(self.module)
            for split, part in (("validation", self.splits.validation), ("test", self.splits.test)):
                if part is not None:
                    self.results[split] = found = self._evaluate_split(part)
                    scalars = self._position() | {"loss": found.loss, "accuracy": found.accuracy}
                    self._log(split, scalars)
                    self.console.evaluated(split, progress.step, scalars)
        if "validation" not in self.results:  # nothing is ever picked by the test set: the latest counts
            progress.best = Best(progress.step, self.results["test"].accuracy, "test")
            return False
        accuracy = self.results["validation"].accuracy
        is_best = progress.best is None or accuracy > progress.best.accuracy
        if is_best:
            progress.best = Best(progress.step, accuracy, "validation")
        return is_best

    def _evaluate_split(self, part: data.Images) -> evaluation.Evaluation:
        """Each sample once, through the module itself: a DDP forward would wait for ranks that have fewer chunks."""
        batch_size, world = self.config.eval.batch_size, self.world
        self.module.eval()
        found = evaluation.evaluate(
            lambda images: self.module(self.augment.plain(images)),
            losses.build(self.config.loss, training=False),
            data.chunks(part, batch_size, world),
            data.num_chunks(part, batch_size),
            self.classes,
            world.sum,
            world.device,
        )
        self.module.train()
        assert found.num_samples == len(part), f"evaluated {found.num_samples} of {len(part)} samples"
        return found

    def _save(self) -> None:
        """A checkpoint by rank 0; then the older ones that need not be kept go."""
        progress, folder, scaler = self.progress, self.folder, self.world.accelerator.scaler
        with self.meter.paused():
            self.world.average_buffers(self.module)
            self._position()
            progress.window, progress.window_samples = self.meter.total(), self.meter.samples
            progress.settings = flatten(self.config)
            best_step = progress.best.step if progress.best and progress.best.split == "validation" else None

            def write() -> None:
                state = {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
                with told(f"checkpoint in {folder.checkpoints}"):
                    checkpoint.save(folder.checkpoints, self.module.state_dict(), state, progress)
                    checkpoint.prune(folder.checkpoints, self.config.checkpoint.keep, best_step)
                    folder.status("running", progress.step)

            self.world.from_first(write)

    def _finish(self) -> None:
        """The weights, the summary, the table."""
        durations, progress = self.durations, self.progress
        rate = self.meter.mean_samples_per_second or progress.last_line["samples_per_second"]
        summary = result.summary(progress, durations.steps_per_epoch, self.world.size, rate, self.results)
        channels = self.splits.train.images.shape[1]

        def write() -> None:
            about = result.about_weights(self.config, self.classes, self.normalization, channels)
            weights = {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}
            with told(f"the result in {self.folder.path}"):
                self.folder.write_file("model.safetensors", lambda path: save_file(weights, path, metadata=about))
                self.folder.write_json("summary.json", summary)
                self.folder.status("finished", progress.step)

        self.world.from_first(write)
        self.close()
        self.console.finished(summary, self.folder.path)

    def _record_failure(self, error: BaseException) -> None:
        """Leaves the reason where status.json is looked at; a folder that cannot be written any more is left alone."""
        if self.world.is_first:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            try:
                self.folder.status("failed", self.progress.step, reason)
            except OSError as second:
                self.console.say(f"status.json could not be written ({second.strerror})")

    def close(self, failed: bool = False) -> None:
        """Closes the trackers and takes the progress bar down."""
        for tracker in self.trackers:
            tracker.close(failed)
        self.trackers = []
        self.console.close()
