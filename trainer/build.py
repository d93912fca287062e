"""The settings and a checkpoint in, all that a run is made of out: data, network, optimizer, step. Prepared once."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from trainer.config.durations import Durations
from trainer.config.load import with_image_size
from trainer.config.schema import ModelSettings, RunConfig
from trainer.data.augment import Augment, Normalization, resolve_normalization
from trainer.data.sampler import BatchSampler
from trainer.data.splits import DataSplits, TensorSplit, load_splits, move_to_device
from trainer.distributed.buffers import Buffers
from trainer.distributed.exchange import GradientExchange
from trainer.distributed.ordered_reduce import OrderedReduction
from trainer.distributed.sharding import ShardLayout
from trainer.distributed.world import World
from trainer.errors import DataError
from trainer.inference.evaluation import Evaluation, Predictions, evaluate_split
from trainer.inference.saved_model import ModelMetadata
from trainer.models.inspect import check_feature_maps
from trainer.models.lookup import build_model, fit_to_data, freeze
from trainer.models.torchvision import preprocessing, pretrained_file
from trainer.optim.losses import SampleLoss
from trainer.optim.optimizers import build_optimizer, restore_state
from trainer.optim.schedule import Schedule
from trainer.run.checkpoint import TrainingState
from trainer.run.watchdog import NullWatchdog
from trainer.step import Step
from trainer.timer import build_timer

# Accelerate need not move them; it would import a second's worth of tensors that are spread over devices, to ask.
_WHERE_THEY_ARE = [False, False]


@dataclass(frozen=True, slots=True)
class Components:
    splits: DataSplits
    about: ModelMetadata
    """what is written beside the network's weights"""
    augment: Augment
    batches: BatchSampler
    durations: Durations
    schedule: Schedule
    module: nn.Module
    """the network itself, as evaluation and checkpoints use it"""
    optimizer: AcceleratedOptimizer
    step: Step
    shard_layout: ShardLayout

    def num_shards(self, step: int) -> int:
        """Shards of a step's batch that are not empty."""
        return min(self.batches.size(step), self.shard_layout.most)

    def evaluate(
        self, part: TensorSplit, config: RunConfig, world: World, at_chunk: Callable[[], None]
    ) -> tuple[Evaluation, Predictions]:
        """Each sample once, through the module itself: a DDP forward would wait for ranks that have fewer chunks."""

        def predict(images: Tensor) -> Tensor:
            at_chunk()
            logits: Tensor = self.module(self.augment.normalize(images))
            return logits

        trained = [module for module in self.module.modules() if module.training]  # not what is frozen
        self.module.eval()
        found = evaluate_split(predict, part, self.splits.classes, config, world)
        for module in trained:
            module.training = True
        return found


def build_components(
    config: RunConfig, world: World, saved: TrainingState | None, watch: NullWatchdog, log: Callable[[str], None]
) -> Components:
    """Raises UserError, on every rank, for what settings, data set and ranks do not allow together."""
    config, of_weights = world.raise_together(lambda: _as_the_weights_want(config))
    # A checkpoint has all weights: the file that they came from may be gone by then.
    model = config.model if saved is None else dataclasses.replace(config.model, pretrained=None)
    if model.pretrained:  # reading the images may take long
        world.raise_together(lambda: pretrained_file(model))
    splits = load_splits(config.data, config.run.seed, world)
    for line in splits.notes:
        log(line)
    normalization = resolve_normalization(config.data.normalize, splits.train.images, of_weights)
    image_shape = splits.train.images.shape[1:]
    splits = move_to_device(splits, config.data, world)
    shuffle, drop_last = config.data.shuffle, config.data.drop_last
    batches = BatchSampler(len(splits.train), config.data.global_batch_size, config.run.seed, shuffle, drop_last)
    durations = Durations.of(config, batches.steps_per_epoch)
    epochs = -(-durations.total_steps // batches.steps_per_epoch)
    augmentation = Augment(config.data, normalization, config.run.seed, world.device, image_shape, epochs)
    schedule = Schedule(config.schedule.name, durations.warmup_steps, durations.total_steps)
    module = _network(model, config, world, splits, batches)
    check_feature_maps(module, config.log.feature_maps)
    optimizer = build_optimizer(module, config.optim, world.precision)
    if saved is None:
        fit_to_data(module, splits.train.images, normalization.std)
    else:
        module.load_state_dict(saved.model)
        restore_state(optimizer, saved.optimizer)
    step, prepared, is_ddp = _prepare(config, world, module, optimizer, augmentation, watch)
    if saved is not None and world.accelerator.scaler is not None and saved.scaler:
        world.accelerator.scaler.load_state_dict(saved.scaler)
    shard_layout = ShardLayout(config.train.virtual_ranks or world.size, may_be_empty=is_ddp)
    about = ModelMetadata(config.model, splits.classes, normalization, config.data.side_pixels, image_shape[0])
    return Components(splits, about, augmentation, batches, durations, schedule, module, prepared, step, shard_layout)


def _as_the_weights_want(config: RunConfig) -> tuple[RunConfig, Normalization | None]:
    """The settings with a number for data.image_size=auto; what data.normalize=weights means, where it is set."""
    of_size, of_values = config.data.image_size == "auto", config.data.normalize == "weights"
    if not (of_size or of_values):
        return config, None
    wanted = preprocessing(config.model)
    config = with_image_size(config, wanted.image_size) if of_size else config
    return config, wanted.normalization if of_values else None


def _prepare(
    config: RunConfig,
    world: World,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    augmentation: Augment,
    watch: NullWatchdog,
) -> tuple[Step, AcceleratedOptimizer, bool]:
    """Accelerate's part: precision, and DDP unless the gradients are added up by us; whether there is DDP."""
    accelerator, reduction = world.accelerator, None
    if config.train.compile:
        module.compile()
    communication = build_timer(world.device)
    adds_up = config.train.virtual_ranks is not None
    if adds_up:
        model = accelerator.prepare_model(  # evaluation mode: its name for precision, but no DDP
            module, device_placement=False, evaluation_mode=True
        )
        prepared = accelerator.prepare_optimizer(optimizer, device_placement=False)
        world.broadcast_module(module)
    else:
        with warnings.catch_warnings():  # accelerate calls DDP by a name that torch 2.15 has another for
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model, prepared = accelerator.prepare(module, optimizer, device_placement=_WHERE_THEY_ARE)
    buffers = Buffers(module)  # now: preparing may give the network other buffers
    if adds_up:
        exchange = GradientExchange(world.rank, world.size, world.device, communication)
        reduction = OrderedReduction(module.parameters(), buffers, exchange)
    step = Step(
        accelerator,
        model,
        prepared,
        SampleLoss(config.loss, training=True),
        augmentation,
        buffers,
        config.run.seed,
        watch,
        communication,
        config.train.clip_grad_norm,
        reduction,
    )
    return step, prepared, world.size > 1 and not adds_up


def _network(
    model: ModelSettings, config: RunConfig, world: World, splits: DataSplits, batches: BatchSampler
) -> nn.Module:
    channels, image_size = splits.train.images.shape[1:3]
    module = world.raise_together(lambda: build_model(model, len(splits.classes), channels, image_size))
    world.raise_together(lambda: freeze(module, model.freeze))
    smallest = min([image_size, *config.data.progressive_sizes])
    shape = (channels, smallest, smallest)
    world.raise_together(lambda: _check_sizes(config, module, channels))
    world.raise_together(lambda: _check_smallest_shard(config, world, module, shape, batches))
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
    config: RunConfig, world: World, module: nn.Module, shape: tuple[int, int, int], batches: BatchSampler
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
