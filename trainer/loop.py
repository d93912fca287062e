"""The Trainer: builds the parts, prepares them once, runs steps, evaluates, saves, logs. Knows all other rooms."""

import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch.optim import Optimizer

from trainer import augment, checkpoint, data, evaluation, losses, models, optim, trackers
from trainer.checkpoint import Best, Progress, Saved
from trainer.console import Console, Quiet
from trainer.errors import FolderError
from trainer.folder import RunFolder
from trainer.meter import Meter
from trainer.sampler import GlobalBatches
from trainer.settings import RunConfig
from trainer.step import Step
from trainer.world import World


def train(config: RunConfig, world: World) -> None:
    """Trains to the end, or shows the result of a run that has got there already. All is left in the run folder."""
    folder = RunFolder(config.folder)
    world.from_first(lambda: folder.check(config))
    trainer = Trainer(config, world, folder)
    if trainer.is_finished():
        trainer.show_finished()
        return
    try:
        trainer.begin()
        trainer.run()
    except BaseException as error:  # recorded for whoever looks at the folder, then told as ever
        trainer.record_failure(error)
        raise
    finally:
        trainer.close()


class Trainer:
    """One run. Every rank makes the same calls; only what is handed to it differs."""

    def __init__(self, config: RunConfig, world: World, folder: RunFolder) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.console = Console() if world.is_first else Quiet()
        self.trackers: list[trackers.Tracker] = [trackers.Silent()]
        self.results: dict[str, evaluation.Evaluation] = {}
        self.last_line: dict[str, float] = {}
        set_seed(config.run.seed)

        splits = data.load(config.data, config.run.seed, world)
        self.classes = splits.classes
        self.normalization = augment.normalization(config.data.normalize, splits.train.images)
        self.augment = augment.Augment(config.data, self.normalization, config.run.seed, world.device)
        self.splits = data.on_device(splits, config.data, world)
        self.batches = GlobalBatches(
            len(splits.train),
            config.data.global_batch_size,
            config.run.seed,
            config.data.shuffle,
            config.data.drop_last,
        )
        self.durations = optim.durations(config, self.batches.steps_per_epoch)
        self.schedule = optim.Schedule(config.schedule.name, self.durations.warmup_steps, self.durations.total_steps)

        saved = self._find_checkpoint()
        self.progress = saved.progress if saved is not None else Progress()
        self._build_model(saved)
        sums = self.progress.window if world.is_first else [0.0, 0.0]
        self.meter = Meter(sums, self.progress.window_samples, world.sum, world.device)

    def _find_checkpoint(self) -> Saved | None:
        """The one that the settings name, or the newest of this run that verifies; the same on every rank."""
        resume = self.config.run.resume
        if resume not in ("auto", "never"):
            return self.world.together(lambda: checkpoint.load(Path(resume).expanduser()))
        place, damaged = self.world.from_first(lambda: checkpoint.newest(self.folder.checkpoints))
        for line in damaged:
            self.console.say(line)
        return self.world.together(lambda: checkpoint.load(place)) if place is not None else None

    def _build_model(self, saved: Saved | None) -> None:
        """The network and its optimizer, from a checkpoint if there is one, then prepared once."""
        config, accelerator = self.config, self.world.accelerator
        channels, image_size = self.splits.train.images.shape[1:3]
        self.module = self.world.together(lambda: models.build(config.model, len(self.classes), channels, image_size))
        self.module.to(self.world.device)
        optimizer = optim.OPTIMIZERS[config.optim.name](self.module.parameters(), config.optim)
        if saved is not None:
            self._load_state(saved, optimizer)
        if config.train.compile:
            self.module.compile()
        model, self.optimizer = accelerator.prepare(self.module, optimizer)
        if saved is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved.optimizer["scaler"])
        self.step = Step(
            accelerator,
            model,
            self.optimizer,
            losses.build(config.loss, training=True),
            self.augment.train,
            config.run.seed,
            config.train.clip_grad_norm,
        )

    def _load_state(self, saved: Saved, optimizer: Optimizer) -> None:
        try:
            self.module.load_state_dict(saved.model)
            optimizer.load_state_dict(saved.optimizer["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FolderError(
                f"run.resume={self.config.run.resume}: that checkpoint is of another network or optimizer ({reason}); "
                "choose one that was made with these settings"
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

    def begin(self) -> None:
        """Opens the run folder and the trackers; from here on the folder is this run's."""
        folder, config, world, step = self.folder, self.config, self.world, self.progress.step
        total_steps = self.durations.total_steps
        devices = world.describe()

        def open_folder() -> None:
            folder.begin(config, devices)
            folder.status("running", step)
            folder.rewind_metrics(step)
            if world.is_first:
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
        self.last_line = self._position() | values | {"lr": lr}
        self._log("train", self.last_line)
        left = self.batches.samples_before(self.durations.total_steps) - self.batches.samples_before(step)
        self.console.training(step, self.last_line, left / values["samples_per_second"])

    def _evaluate(self) -> bool:
        """Evaluates on the held-out part, if there is one, and on the test set; whether this is the best so far."""
        progress = self.progress
        with self.meter.paused():
            self.world.average_buffers(self.module)
            for split, part in (("validation", self.splits.validation), ("test", self.splits.test)):
                if part is not None:
                    self.results[split] = result = self._evaluate_split(part)
                    scalars = self._position() | {"loss": result.loss, "accuracy": result.accuracy}
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
        result = evaluation.evaluate(
            lambda images: self.module(self.augment.plain(images)),
            losses.build(self.config.loss, training=False),
            data.chunks(part, batch_size, world),
            data.num_chunks(part, batch_size),
            self.classes,
            world.sum,
            world.device,
        )
        self.module.train()
        assert result.num_samples == len(part), f"evaluated {result.num_samples} of {len(part)} samples"
        return result

    def _save(self) -> None:
        """A checkpoint by rank 0; then the older ones that need not be kept go."""
        progress, folder, scaler = self.progress, self.folder, self.world.accelerator.scaler
        with self.meter.paused():
            self.world.average_buffers(self.module)
            self._position()
            progress.window, progress.window_samples = self.meter.total(), self.meter.samples
            best_step = progress.best.step if progress.best and progress.best.split == "validation" else None

            def write() -> None:
                state = {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
                try:
                    checkpoint.save(folder.checkpoints, self.module.state_dict(), state, progress)
                    checkpoint.prune(folder.checkpoints, self.config.checkpoint.keep, best_step)
                    folder.status("running", progress.step)
                except OSError as error:
                    raise FolderError(
                        f"checkpoint in {folder.checkpoints} cannot be written ({error.strerror}); "
                        "make room there, then the same command goes on from the one before it"
                    ) from None

            self.world.from_first(write)

    def _finish(self) -> None:
        """The weights, the summary, the table."""
        summary = self._summary()

        def write() -> None:
            self.folder.write_file(
                "model.safetensors",
                lambda path: save_file(
                    {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()},
                    path,
                    metadata=self._about_weights(),
                ),
            )
            self.folder.write_json("summary.json", summary)
            self.folder.status("finished", self.progress.step)

        self.world.from_first(write)
        self.close()
        self.console.finished(summary, self.folder.path)

    def _summary(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "state": "finished",
            "steps": progress.step,
            "epochs": progress.step / self.durations.steps_per_epoch,
            "world_size": self.world.size,
            "seconds": progress.seconds,
            "train": {
                "loss": self.last_line.get("loss"),
                "accuracy": self.last_line.get("accuracy"),
                "samples_per_second": self.meter.mean_samples_per_second,
            },
            **{split: asdict(result) for split, result in self.results.items()},
            "best": asdict(progress.best) if progress.best else None,
        }

    def _about_weights(self) -> dict[str, str]:
        """What model.safetensors says of itself: enough to build the network and to feed it."""
        return {
            "format": "pt",
            "model": json.dumps(asdict(self.config.model)),
            "classes": json.dumps(self.classes),
            "normalization": json.dumps(asdict(self.normalization)),
            "image_size": str(self.config.data.image_size),
            "channels": str(self.splits.train.images.shape[1]),
        }

    def record_failure(self, error: BaseException) -> None:
        """Leaves the reason where status.json is looked at; a folder that cannot be written any more is left alone."""
        if self.world.is_first:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            try:
                self.folder.status("failed", self.progress.step, reason)
            except OSError as second:
                self.console.say(f"status.json could not be written ({second.strerror})")

    def close(self) -> None:
        """Closes the trackers and takes the progress bar down."""
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []
        self.console.close()
