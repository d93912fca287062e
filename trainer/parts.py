"""The settings and a checkpoint in, all that a run is made of out: data, network, optimizer, step. Prepared once."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from trainer import (
    augment,
    data,
    evaluation,
    feature_maps,
    losses,
    models,
    optim,
    stopwatch,
    tta,
)
from trainer import config as configs
from trainer.augment import Augment, Normalization
from trainer.buffers import Buffers
from trainer.checkpoint import State
from trainer.errors import DataError
from trainer.evaluation import Evaluation, Predictions
from trainer.group_exchange import GroupExchange
from trainer.reduction import OrderedReduction
from trainer.sampler import GlobalBatches
from trainer.schedule import Durations, Schedule
from trainer.settings import Model, RunConfig
from trainer.shards import Cutting
from trainer.step import Step
from trainer.trained import About
from trainer.watch import Unwatched
from trainer.world import World

# Accelerate need not move them; it would import a second's worth of tensors that are spread over devices, to ask.
_WHERE_THEY_ARE = [False, False]


@dataclass(frozen=True, slots=True)
class Parts:
    splits: data.Splits
    about: About
    """what is written beside the network's weights"""
    augment: Augment
    batches: GlobalBatches
    durations: Durations
    schedule: Schedule
    module: nn.Module
    """the network itself, as evaluation and checkpoints use it"""
    optimizer: AcceleratedOptimizer
    step: Step
    cutting: Cutting

    def num_shards(self, step: int) -> int:
        """Shards of a step's batch that are not empty."""
        return min(self.batches.size(step), self.cutting.most)

    def evaluate(
        self, part: data.Images, config: RunConfig, world: World, at_chunk: Callable[[], None]
    ) -> tuple[Evaluation, Predictions]:
        """Each sample once, through the module itself: a DDP forward would wait for ranks that have fewer chunks."""

        def predict(images: Tensor) -> Tensor:
            at_chunk()
            logits: Tensor = self.module(self.augment.plain(images))
            return logits

        trained = [module for module in self.module.modules() if module.training]  # not what is frozen
        self.module.eval()
        found = evaluate(predict, part, self.splits.classes, config, world)
        for module in trained:
            module.training = True
        return found


def evaluate(
    predict: Callable[[Tensor], Tensor], part: data.Images, classes: tuple[str, ...], config: RunConfig, world: World
) -> tuple[Evaluation, Predictions]:
    """Each sample once, on whichever rank. predict: uint8 [B, C, H, W] in, logits [B, num_classes] out."""
    batch_size = config.eval.batch_size
    found, predictions = evaluation.evaluate(
        predict,
        tta.build(config.eval.tta),
        losses.SampleLoss(config.loss, training=False),
        data.chunks(part, batch_size, world),
        len(part),
        batch_size,
        classes,
        world.sum,
        world.device,
    )
    assert found.num_samples == len(part), f"evaluated {found.num_samples} of {len(part)} samples"
    return found, predictions


def build(config: RunConfig, world: World, saved: State | None, watch: Unwatched, say: Callable[[str], None]) -> Parts:
    """Raises UserError, on every rank, for what settings, data set and ranks do not allow together."""
    config, of_weights = world.together(lambda: _as_the_weights_want(config))
    # A checkpoint has all weights: the file that they came from may be gone by then.
    model = config.model if saved is None else dataclasses.replace(config.model, pretrained=None)
    if model.pretrained:  # reading the images may take long
        world.together(lambda: models.weights_file(model))
    splits = data.load(config.data, config.run.seed, world)
    for line in splits.notes:
        say(line)
    normalization = augment.normalization(config.data.normalize, splits.train.images, of_weights)
    image_shape = splits.train.images.shape[1:]
    splits = data.on_device(splits, config.data, world)
    shuffle, drop_last = config.data.shuffle, config.data.drop_last
    batches = GlobalBatches(len(splits.train), config.data.global_batch_size, config.run.seed, shuffle, drop_last)
    durations = Durations.of(config, batches.steps_per_epoch)
    epochs = -(-durations.total_steps // batches.steps_per_epoch)
    augmentation = Augment(config.data, normalization, config.run.seed, world.device, image_shape, epochs)
    schedule = Schedule(config.schedule.name, durations.warmup_steps, durations.total_steps)
    module = _network(model, config, world, splits, batches)
    feature_maps.check(module, config.log.feature_maps)
    optimizer = optim.build(module, config.optim, world.precision)
    if saved is None:
        models.fit(module, splits.train.images, normalization.std)
    else:
        module.load_state_dict(saved.model)
        optim.restore(optimizer, saved.optimizer)
    step, prepared, is_ddp = _prepare(config, world, module, optimizer, augmentation, watch)
    if saved is not None and world.accelerator.scaler is not None and saved.scaler:
        world.accelerator.scaler.load_state_dict(saved.scaler)
    cutting = Cutting(config.train.virtual_ranks or world.size, may_be_empty=is_ddp)
    about = About(config.model, splits.classes, normalization, config.data.side_pixels, image_shape[0])
    return Parts(splits, about, augmentation, batches, durations, schedule, module, prepared, step, cutting)


def _as_the_weights_want(config: RunConfig) -> tuple[RunConfig, Normalization | None]:
    """The settings with a number for data.image_size=auto; what data.normalize=weights means, where it is set."""
    of_size, of_values = config.data.image_size == "auto", config.data.normalize == "weights"
    if not (of_size or of_values):
        return config, None
    wanted = models.preprocessing(config.model)
    config = configs.with_image_size(config, wanted.image_size) if of_size else config
    return config, wanted.normalization if of_values else None


def _prepare(
    config: RunConfig,
    world: World,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    augmentation: Augment,
    watch: Unwatched,
) -> tuple[Step, AcceleratedOptimizer, bool]:
    """Accelerate's part: precision, and DDP unless the gradients are added up by us; whether there is DDP."""
    accelerator, reduction = world.accelerator, None
    if config.train.compile:
        module.compile()
    communication = stopwatch.build(world.device)
    adds_up = config.train.virtual_ranks is not None
    if adds_up:
        model = accelerator.prepare_model(  # evaluation mode: its name for precision, but no DDP
            module, device_placement=False, evaluation_mode=True
        )
        prepared = accelerator.prepare_optimizer(optimizer, device_placement=False)
        world.same_everywhere(module)
    else:
        with warnings.catch_warnings():  # accelerate calls DDP by a name that torch 2.15 has another for
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model, prepared = accelerator.prepare(module, optimizer, device_placement=_WHERE_THEY_ARE)
    buffers = Buffers(module)  # now: preparing may give the network other buffers
    if adds_up:
        exchange = GroupExchange(world.rank, world.size, world.device, communication)
        reduction = OrderedReduction(module.parameters(), buffers, exchange)
    step = Step(
        accelerator,
        model,
        prepared,
        losses.SampleLoss(config.loss, training=True),
        augmentation,
        buffers,
        config.run.seed,
        watch,
        communication,
        config.train.clip_grad_norm,
        reduction,
    )
    return step, prepared, world.size > 1 and not adds_up


def _network(model: Model, config: RunConfig, world: World, splits: data.Splits, batches: GlobalBatches) -> nn.Module:
    channels, image_size = splits.train.images.shape[1:3]
    module = world.together(lambda: models.build(model, len(splits.classes), channels, image_size))
    world.together(lambda: models.freeze(module, model.freeze))
    smallest = min([image_size, *config.data.progressive_sizes])
    shape = (channels, smallest, smallest)
    world.together(lambda: _check_sizes(config, module, channels))
    world.together(lambda: _check_smallest_shard(config, world, module, shape, batches))
    # Convolutions read all channels of a pixel at once: on a CPU 1.3 to 1.5 times as fast, on a GPU's matrix units too.
    module.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _check_sizes(config: RunConfig, module: nn.Module, channels: int) -> None:
    """Raises DataError when the network refuses one of data.progressive_sizes."""
    tried = copy.deepcopy(module).eval()
    for size in sorted(set(config.data.progressive_sizes)):
        try:
            with torch.no_grad():
                tried(torch.zeros(1, channels, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:  # how networks refuse, each its own way
            reason = " ".join(str(error).split())[:160]
            raise DataError(
                f"data.progressive_sizes={config.data.progressive_sizes}: {config.model.name} cannot take "
                f"{size} pixels ({reason}); choose others"
            ) from None


def _check_smallest_shard(
    config: RunConfig, world: World, module: nn.Module, shape: tuple[int, int, int], batches: GlobalBatches
) -> None:
    """Raises DataError when a shard is one sample and a BatchNorm layer would see one value a channel of it."""
    shards = config.train.virtual_ranks or world.size
    sizes = {batches.size(0), batches.size(batches.steps_per_epoch - 1)}
    if not any(size // shards <= 1 for size in sizes):
        return
    try:
        copy.deepcopy(module)(torch.zeros(1, *shape))
    except ValueError as error:
        ways = "change data.global_batch_size, or set data.drop_last=true"
        among = f"{shards} ranks" if config.train.virtual_ranks is None else f"{shards} virtual ranks"
        raise DataError(
            f"batches of {' and '.join(map(str, sorted(sizes)))} samples leave one of {among} a single one, "
            f"which {config.model.name} cannot normalize ({error}); {ways}"
        ) from None
