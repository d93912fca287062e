"""The Trainer: builds the parts, prepares them once, runs steps, evaluates, saves, logs. The file that knows the rest."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file

from trainer import augment, checkpoint, data, evaluation, losses, models, optim, trackers
from trainer.checkpoint import Best, Progress
from trainer.config import RunConfig
from trainer.console import Console, Quiet
from trainer.errors import FolderError
from trainer.folder import RunFolder
from trainer.sampler import GlobalBatches
from trainer.step import Step
from trainer.world import World


def train(config: RunConfig, world: World) -> None:
    """Trains to the end, or shows the result of a run that has got there already. Leaves everything in the run folder."""
    folder = RunFolder(config.folder)
    world.from_first(lambda: folder.check(config))
    trainer = Trainer(config, world, folder)
    if trainer.is_finished():
        trainer.show_finished()
        return
    try:
        trainer.run()
    except BaseException as error:  # recorded for whoever looks at the folder, then told as ever
        if world.is_first:
            folder.status("failed", trainer.progress.step, f"{type(error).__name__}: {error}")
        raise
    finally:
        trainer.close()


class Trainer:
    """One run. Every rank makes the same calls; only what is handed to it differs."""

    def __init__(self, config: RunConfig, world: World, folder: RunFolder) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.console: Quiet = Console() if world.is_first else Quiet()
        self.trackers: list[trackers.Tracker] = [trackers.Silent()]
        self.progress, self._saved = Progress(), self._find_checkpoint()
        set_seed(config.run.seed)

        splits = data.load(config.data, config.run.seed, world)
        self.normalization = augment.normalization(config.data.normalize, splits.train.images)
        self.augment = augment.Augment(config.data, self.normalization, config.run.seed, world.device)
        self.classes = splits.classes
        self.splits = data.on_device(splits, config.data, world)
        settings = config.data
        self.batches = GlobalBatches(
            len(splits.train), settings.global_batch_size, config.run.seed, settings.shuffle, settings.drop_last
        )
        self.durations = optim.durations(config, self.batches.steps_per_epoch)
        self.schedule = optim.Schedule(config.schedule.name, self.durations.warmup_steps, self.durations.total_steps)
        self._build(channels=splits.train.images.shape[1])

        self._window = torch.tensor(self.progress.window, dtype=torch.float64, device=world.device) / world.size
        self._train_seconds = 0.0  # of this session, without evaluations and saves
        self._first_step = self.progress.step
        self._last_line: dict[str, float] = {}
        self._results: dict[str, evaluation.Evaluation] = {}

    def _build(self, channels: int) -> None:
        """The network and its optimizer, from a checkpoint if there is one, then prepared once."""
        config, world = self.config, self.world
        image_size = config.data.image_size
        self.module = world.together(lambda: models.build(config.model, len(self.classes), channels, image_size))
        self.module.to(world.device)
        plain_optimizer = optim.OPTIMIZERS[config.optim.name](self.module.parameters(), config.optim)
        if self._saved is not None:
            self.module.load_state_dict(self._saved.model)
            plain_optimizer.load_state_dict(self._saved.optimizer["optimizer"])
            self.progress = self._saved.progress
        if config.train.compile:
            self.module.compile()
        self.model, self.optimizer = world.accelerator.prepare(self.module, plain_optimizer)
        self.scaler = world.accelerator.scaler
        if self._saved is not None and self.scaler is not None:
            self.scaler.load_state_dict(self._saved.optimizer["scaler"])
        self._saved = None  # as large as the model and its optimizer
        loss = losses.build(config.loss, training=True)
        self.step = Step(
            world.accelerator, self.model, self.optimizer, loss, self.augment.train, config.run.seed, config.train.clip_grad_norm
        )

    def _find_checkpoint(self) -> checkpoint.Saved | None:
        """The one that the settings name, or the newest of this run that verifies; the same on every rank."""
        resume = self.config.run.resume
        if resume not in ("auto", "never"):
            return self.world.together(lambda: checkpoint.load(Path(resume).expanduser()))

        def look() -> tuple[Path | None, list[str]]:
            return checkpoint.newest(self.folder.checkpoints)

        place, damaged = self.world.from_first(look)
        for line in damaged:
            self.console.say(line)
        return self.world.together(lambda: checkpoint.load(place)) if place is not None else None

    def is_finished(self) -> bool:
        """Whether the run has all its steps and its results, so that there is nothing left to do."""

        def look() -> bool:
            summary = self.folder.read_json("summary.json")
            return summary is not None and summary["steps"] == self.progress.step

        return self.progress.step >= self.durations.total_steps and self.world.from_first(look)

    def show_finished(self) -> None:
        """Says so, and shows the result again."""
        self.console.say(
            f"run {self.folder.path} is finished ({self.progress.step:,} steps); nothing was trained. "
            "To train again choose another run.name; to train on raise train.epochs"
        )
        if self.world.is_first:
            self.console.finished(self.folder.read_json("summary.json"), self.folder.path)

    def run(self) -> None:
        """From the step where the run is to its last."""
        config, progress, world = self.config, self.progress, self.world
        total_steps = self.durations.total_steps
        self._begin()
        loader = data.train_loader(self.splits.train, self.batches, config.data, world, progress.step, total_steps)
        self._mark = self._started = time.perf_counter()
        self._seconds_before = progress.seconds
        for batch in loader:
            step = progress.step
            epoch, global_size = self.batches.epoch(step), self.batches.size(step)
            optim.set_lr(self.optimizer, config.optim.lr * self.schedule.lr_factor(step))
            self._window += self.step(batch, step, epoch, global_size)
            progress.window_samples += global_size
            progress.step = step = step + 1
            last = step == total_steps
            if last or step % config.log.every_steps == 0:
                self._log_training()
            evaluated_best = False
            if last or self.durations.due(step, config.eval.every_epochs):
                evaluated_best = self._evaluate()
            if last or evaluated_best or self._save_is_due(step):
                self._save()
            self.console.tick(step)
        assert progress.step == total_steps
        self._finish()

    def _begin(self) -> None:
        """Opens the run folder and the trackers; from here on the folder is this run's."""
        folder, config, step = self.folder, self.config, self.progress.step
        devices = self.world.describe()

        def open_folder() -> None:
            folder.begin(config, devices)
            folder.status("running", step)
            folder.rewind_metrics(step)
            self.trackers = trackers.build(config, folder, step, self.console.say)

        self.world.from_first(open_folder)
        weights = sum(parameter.numel() for parameter in self.module.parameters())
        train, world = self.splits.train, self.world
        self.console.say(
            f"{'going on with' if step else 'training'} {config.run.name}: {config.model.name} ({weights:,} weights) on "
            f"{len(train):,} images of {config.data.name}, {world.size} x {world.device.type} x {world.threads} threads, "
            f"{world.precision}, global batch {config.data.global_batch_size:,}, "
            f"{self.durations.steps_per_epoch:,} steps an epoch, step {step:,} of {self.durations.total_steps:,}"
        )
        self.console.start(step, self.durations.total_steps)

    def _save_is_due(self, step: int) -> bool:
        settings = self.config.checkpoint
        return self.durations.due(step, settings.every_epochs, settings.every_steps)

    def _log_training(self) -> None:
        """A line on the steps since the last one. The only place where a step's values leave the device."""
        progress = self.progress
        loss_sum, correct = self.world.sum(self._window.clone()).tolist()
        samples = progress.window_samples
        now = time.perf_counter()
        self._train_seconds += now - self._mark
        rate = (self.batches.samples_before(progress.step) - self.batches.samples_before(self._first_step)) / self._train_seconds
        lr = self.config.optim.lr * self.schedule.lr_factor(progress.step - 1)
        self._last_line = self._position() | {
            "loss": loss_sum / samples, "accuracy": correct / samples, "lr": lr, "samples_per_second": rate,
        }  # fmt: skip
        self._log("train", self._last_line)
        total = self.batches.samples_before(self.durations.total_steps)
        self.console.training(progress.step, self._last_line, (total - self.batches.samples_before(progress.step)) / rate)
        self._window.zero_()
        progress.window_samples = 0
        self._mark = now

    def _position(self) -> dict[str, float]:
        """Where the run is, as every row tells it."""
        self.progress.seconds = self._seconds_before + time.perf_counter() - self._started
        step = self.progress.step
        return {
            "epoch": step / self.durations.steps_per_epoch,
            "samples": self.batches.samples_before(step),
            "seconds": self.progress.seconds,
        }

    def _log(self, split: str, scalars: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(split, scalars, self.progress.step)

    def _evaluate(self) -> bool:
        """Evaluates on the held-out part, if there is one, and on the test set; whether this is the best so far."""
        began = time.perf_counter()
        self.world.average_buffers(self.module)
        best = self.progress.best
        for split, part in (("validation", self.splits.validation), ("test", self.splits.test)):
            if part is None:
                continue
            result = self._results[split] = self._evaluate_split(part)
            scalars = self._position() | {"loss": result.loss, "accuracy": result.accuracy}
            self._log(split, scalars)
            self.console.evaluated(split, self.progress.step, scalars)
        if "validation" in self._results:
            accuracy = self._results["validation"].accuracy
            is_best = best is None or accuracy > best.accuracy
            if is_best:
                self.progress.best = Best(self.progress.step, accuracy, "validation")
        else:  # nothing is ever picked by the test set: without a held-out part the latest counts
            is_best = False
            self.progress.best = Best(self.progress.step, self._results["test"].accuracy, "test")
        self._mark += time.perf_counter() - began
        return is_best

    def _evaluate_split(self, part: data.Images) -> evaluation.Evaluation:
        """Each sample once, on the module itself: a DDP forward would wait for ranks that have fewer chunks."""
        world, batch_size = self.world, self.config.eval.batch_size
        loss = losses.build(self.config.loss, training=False)
        tally = evaluation.Tally(data.num_chunks(part, batch_size), len(self.classes), world.device)
        self.module.eval()
        with torch.no_grad():
            for chunk, images, labels in data.chunks(part, batch_size, world):
                logits = self.module(self.augment.plain(images)).float()
                tally.add(chunk, logits, labels, loss(logits, labels))
        self.module.train()
        loss_sum = float(world.sum(tally.loss_sums).sum())
        confusion = world.sum(tally.confusion).view(len(self.classes), -1).cpu()
        counted = int(confusion.sum())
        assert counted == len(part), f"evaluated {counted} of {len(part)} samples"
        return evaluation.score(loss_sum, confusion, self.classes)

    def _save(self) -> None:
        """A checkpoint by rank 0, then the older ones that are no longer kept go."""
        began = time.perf_counter()
        self.world.average_buffers(self.module)
        self._position()
        self.progress.window = self.world.sum(self._window.clone()).tolist()
        best = self.progress.best
        if self.world.is_first:
            state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict() if self.scaler else None}
            try:
                checkpoint.save(self.folder.checkpoints, self.module.state_dict(), state, self.progress)
                checkpoint.prune(
                    self.folder.checkpoints, self.config.checkpoint.keep, best.step if best and best.split == "validation" else None
                )
            except OSError as error:
                raise FolderError(
                    f"checkpoint in {self.folder.checkpoints} cannot be written ({error.strerror}); the run goes on from the "
                    "one before it: make room and give the same command again"
                ) from None
            self.folder.status("running", self.progress.step)
        self._mark += time.perf_counter() - began

    def _finish(self) -> None:
        """The weights, the summary, the table."""
        summary = self._summary()
        if self.world.is_first:
            partial = self.folder.path / ".model.safetensors.partial"
            weights = {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}
            save_file(weights, partial, metadata=self._about_weights())
            partial.replace(self.folder.path / "model.safetensors")
            self.folder.write_json("summary.json", summary)
            self.folder.status("finished", self.progress.step)
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []
        self.console.finished(summary, self.folder.path)

    def _summary(self) -> dict[str, Any]:
        progress = self.progress
        results = {split: dataclasses.asdict(result) for split, result in self._results.items()}
        return {
            "state": "finished",
            "steps": progress.step,
            "epochs": progress.step / self.durations.steps_per_epoch,
            "world_size": self.world.size,
            "seconds": progress.seconds,
            "train": {name: self._last_line[name] for name in ("loss", "accuracy", "samples_per_second")},
            **results,
            "best": dataclasses.asdict(progress.best) if progress.best else None,
        }

    def _about_weights(self) -> dict[str, str]:
        """What model.safetensors says of itself: enough to build the network and feed it."""
        return {
            "format": "pt",
            "model": json.dumps(dataclasses.asdict(self.config.model)),
            "classes": json.dumps(self.classes),
            "normalization": json.dumps(dataclasses.asdict(self.normalization)),
            "image_size": str(self.config.data.image_size),
            "channels": str(self.splits.train.images.shape[1]),
        }

    def close(self) -> None:
        """Closes what is still open, as after an error."""
        for tracker in self.trackers:
            tracker.close()
        self.console.close()
