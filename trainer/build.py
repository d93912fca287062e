"""Builds the components of a run from the settings and a checkpoint: data, network, optimizer and step."""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from trainer.config.durations import Durations
from trainer.config.schema import ModelSettings, RunConfig
from trainer.data.augment import Augment
from trainer.data.identity import DataIdentity, check_same_data, read_identity
from trainer.data.loader import check_shared_memory
from trainer.data.normalization import Normalization, resolve_normalization
from trainer.data.sampler import BatchSampler
from trainer.data.splits import DataSplits, TensorSplit, load_splits, move_to_device
from trainer.distributed.buffers import Buffers
from trainer.distributed.exchange import GradientExchange
from trainer.distributed.ordered_reduce import OrderedReduction
from trainer.distributed.sharding import ShardLayout
from trainer.distributed.world import World
from trainer.inference.evaluation import Evaluation, Predictions, evaluate_split
from trainer.inference.saved_model import ModelMetadata
from trainer.models.fit import apply_pretrained_preprocessing, build_fitting_model
from trainer.models.inspect import count_parameters
from trainer.models.lookup import fit_to_data
from trainer.models.torchvision import pretrained_file
from trainer.optim.losses import SampleLoss
from trainer.optim.optimizers import build_optimizer, restore_state
from trainer.optim.schedule import Schedule
from trainer.run.checkpoint import TrainingState
from trainer.run.watchdog import NullWatchdog
from trainer.step import Step
from trainer.timer import build_timer

# Network and optimizer are on their devices already. Accelerate's check for this imports distributed tensors (1 s).
_NO_DEVICE_PLACEMENT = [False, False]


@dataclass(frozen=True, slots=True)
class Components:
    """Everything that a run's training loop works with."""

    splits: DataSplits
    model_metadata: ModelMetadata
    """written to model.safetensors with the weights"""
    augment: Augment
    batches: BatchSampler
    durations: Durations
    schedule: Schedule
    module: nn.Module
    """the network without DDP or autocast wrappers; evaluation and checkpoints use it"""
    optimizer: AcceleratedOptimizer
    step: Step
    shard_layout: ShardLayout

    def describe(self) -> dict[str, object]:
        """Returns the numbers of weights and of images, for environment.json."""
        splits = self.splits
        named = {"train": splits.train, "validation": splits.validation, "test": splits.test}
        total, trained = count_parameters(self.module)
        return {
            "parameters": total,
            "trained_parameters": trained,
            "num_images": {name: len(split) for name, split in named.items() if split is not None},
        }

    def num_shards(self, step: int) -> int:
        """Returns the number of shards with samples in a step's batch."""
        return min(self.batches.batch_size(step), self.shard_layout.max_shards)

    def evaluate(
        self, split: TensorSplit, config: RunConfig, world: World, on_chunk: Callable[[], None]
    ) -> tuple[Evaluation, Predictions]:
        """Evaluates each sample of a split once, on all ranks together.

        Uses the bare module: a DDP forward pass would wait for ranks that have fewer chunks.
        on_chunk: called before each forward pass.
        """

        def predict(images: Tensor) -> Tensor:
            on_chunk()
            logits: Tensor = self.module(self.augment.normalize(images))
            return logits

        training_modules = [module for module in self.module.modules() if module.training]  # not the frozen ones
        self.module.eval()
        result = evaluate_split(predict, split, self.splits.classes, config, world)
        for module in training_modules:
            module.training = True
        return result


def build_components(
    config: RunConfig, world: World, saved: TrainingState | None, watchdog: NullWatchdog, log: Callable[[str], None]
) -> Components:
    """Builds all components, with the weights and the optimizer state of `saved` if given.

    Raises UserError, on every rank, if settings, data set and ranks do not fit together.
    """
    config, pretrained_normalization = world.raise_together(lambda: apply_pretrained_preprocessing(config))
    # A checkpoint has all weights, and the file of pretrained weights may be gone when a run resumes.
    model = config.model if saved is None else dataclasses.replace(config.model, pretrained=None)
    if model.pretrained:  # check the file before reading the images, which may take long
        world.raise_together(lambda: pretrained_file(model))
    splits, normalization = _load_data(config, world, saved, pretrained_normalization, log)
    image_shape = splits.train.images.shape[1:]
    batches = BatchSampler(
        len(splits.train), config.data.global_batch_size, config.run.seed, config.data.shuffle, config.data.drop_last
    )
    durations = Durations.from_config(config, batches.steps_per_epoch)
    num_epochs = -(-durations.total_steps // batches.steps_per_epoch)
    augment = Augment(config.data, normalization, config.run.seed, world.device, image_shape, num_epochs)
    world.raise_together(lambda: check_shared_memory(splits.train, augment.uses_partners, config, world))
    module = _build_network(model, config, world, splits, batches)
    optimizer = _build_optimizer(module, config, world, splits, normalization, saved)
    step, prepared_optimizer = _build_step(config, world, module, optimizer, augment, watchdog)
    if saved is not None and world.accelerator.scaler is not None and saved.scaler:
        world.accelerator.scaler.load_state_dict(saved.scaler)
    uses_ddp = world.size > 1 and config.train.virtual_ranks is None
    return Components(
        splits,
        ModelMetadata(config.model, splits.classes, normalization, config.data.side_pixels, image_shape[0]),
        augment,
        batches,
        durations,
        Schedule.from_config(config, durations),
        module,
        prepared_optimizer,
        step,
        ShardLayout(config.train.virtual_ranks or world.size, allows_empty_shards=uses_ddp),
    )


def _load_data(
    config: RunConfig,
    world: World,
    saved: TrainingState | None,
    pretrained_normalization: Normalization | None,
    log: Callable[[str], None],
) -> tuple[DataSplits, Normalization]:
    """Returns the splits on their device, and the normalization of their images.

    Raises DataError, on every rank, unless the data set is the one that `saved` was trained on.
    """
    splits = load_splits(config.data, config.run.seed, world)
    for line in splits.notes:
        log(line)
    if saved is not None and (note := world.broadcast_from_rank0(lambda: _check_data(saved, splits.identity, config))):
        log(note)
    normalization = resolve_normalization(config.data.normalize, splits.train.images, pretrained_normalization)
    return move_to_device(splits, config.data, world), normalization


def _check_data(saved: TrainingState, identity: DataIdentity, config: RunConfig) -> str:
    """Returns a line for the user, or "". Raises DataError unless `saved` was trained on this data set."""
    assert saved.path is not None
    if not saved.progress.data:
        return f"checkpoint {saved.path} has no record of its data set, so the data are not compared with it"
    run = saved.path.resolve().parent.parent  # has the lists of samples
    before = read_identity(saved.progress.data, saved.path / "progress.json", run)
    return check_same_data(before, identity, config.data.accept_added_test_images, f"checkpoint {saved.path}")


def _build_network(
    model: ModelSettings, config: RunConfig, world: World, splits: DataSplits, batches: BatchSampler
) -> nn.Module:
    """Returns the network on its device, after checking that it accepts the run's images and shards."""
    channels, image_size = splits.train.images.shape[1:3]
    image_shape = (channels, image_size, image_size)
    module = world.raise_together(
        lambda: build_fitting_model(model, config, world.size, len(splits.classes), image_shape, batches.sizes)
    )
    # channels_last stores all channels of a pixel side by side: convolutions are 1.3 to 1.5 times as fast on a CPU, and
    # faster on a GPU's tensor cores too.
    module.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _build_optimizer(
    module: nn.Module,
    config: RunConfig,
    world: World,
    splits: DataSplits,
    normalization: Normalization,
    saved: TrainingState | None,
) -> torch.optim.Optimizer:
    """Returns the optimizer. Loads network and optimizer from `saved`, or fits the new network to the data."""
    optimizer = build_optimizer(module, config.optim, world.precision)
    if saved is None:
        fit_to_data(module, splits.train.images, normalization.std)
    else:
        module.load_state_dict(saved.model)
        restore_state(optimizer, saved.optimizer)
    return optimizer


def _build_step(
    config: RunConfig,
    world: World,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    augment: Augment,
    watchdog: NullWatchdog,
) -> tuple[Step, AcceleratedOptimizer]:
    """Returns the step and the optimizer as Accelerate prepares it.

    Accelerate adds mixed precision, and DDP unless virtual ranks sum the gradients in their own order.
    """
    if config.train.compile:
        module.compile()
    communication = build_timer(world.device)
    has_virtual_ranks = config.train.virtual_ranks is not None
    prepare = _prepare_without_ddp if has_virtual_ranks else _prepare_with_ddp
    model, prepared_optimizer = prepare(world, module, optimizer)
    buffers = Buffers(module)  # after the preparation, which may replace the network's buffers
    reduction = None
    if has_virtual_ranks:
        exchange = GradientExchange(world.rank, world.size, world.device, communication)
        reduction = OrderedReduction(module.parameters(), buffers, exchange)
    step = Step(
        world.accelerator,
        model,
        prepared_optimizer,
        SampleLoss(config.loss, training=True),
        augment,
        buffers,
        config.run.seed,
        watchdog,
        communication,
        config.train.clip_grad_norm,
        reduction,
    )
    return step, prepared_optimizer


def _prepare_without_ddp(
    world: World, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    # Accelerate's evaluation mode adds mixed precision but no DDP; the network stays in training mode.
    model = world.accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
    prepared_optimizer = world.accelerator.prepare_optimizer(optimizer, device_placement=False)
    world.broadcast_module(module)
    return model, prepared_optimizer


def _prepare_with_ddp(
    world: World, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    with warnings.catch_warnings():  # accelerate passes DDP an argument that torch 2.15 deprecates
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, prepared_optimizer = world.accelerator.prepare(module, optimizer, device_placement=_NO_DEVICE_PLACEMENT)
    return model, prepared_optimizer
