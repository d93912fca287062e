"""One optimizer step: this rank's shards of a global batch in, their sums out.

Plainly, a rank has one shard, its slice; with virtual ranks it has any number of them, one after the other. All shards'
gradients are added up by reduction.py, in an order that does not depend on the ranks, or the plain ones by DDP, where
ranks share no memory. Either way all ranks hold the same weights, buffers and optimizer state after each step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from trainer import rng
from trainer.data.augment import Augment
from trainer.data.loader import Samples, Shard
from trainer.distributed.buffers import Buffers
from trainer.distributed.ordered_reduce import OrderedReduction
from trainer.errors import TrainingError
from trainer.optim.losses import SampleLoss
from trainer.optim.optimizers import skips_on_device
from trainer.run.watchdog import NullWatchdog
from trainer.timer import Timer


class ShardResult(NamedTuple):
    """What a shard of a batch came to, on the device."""

    loss_sum: Tensor
    """float []"""
    logits: Tensor
    """float [B, num_classes]"""
    labels: Tensor
    """int64 [B]"""
    weight: float
    """1, or 0 for a shard that does not count"""


class StepOutcome(NamedTuple):
    """Of one step on this rank: nothing here waits for the device."""

    results: list[ShardResult]
    skipped: Tensor
    """float32 []; 1: loss or gradient were not finite, on whatever rank, and nothing was changed; else 0"""
    grad_norm: Tensor | None = None
    """float []; the Euclidean norm of the mean gradient over all trained weights, before it was clipped; not finite
    where the step was skipped"""

    def loss_sum(self) -> Tensor:
        """float64 [], whatever it is; 0 on a rank without a shard."""
        total = self.skipped.new_zeros((), dtype=torch.float64)
        for result in self.results:
            total = total + quantize_losses(result.loss_sum)
        return total


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Step:
    """Forward, backward, update. Every rank makes the same calls, those without samples too."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        loss: SampleLoss,
        augment: Augment,
        buffers: Buffers,
        seed: int,
        watch: NullWatchdog,
        communication: Timer,
        clip_grad_norm: float | None = None,
        reduction: OrderedReduction | None = None,
    ) -> None:
        """communication: runs while the other ranks' gradients and moves are waited for; reduction: without it the
        model is DDP's where there are several ranks."""
        self._accelerator = accelerator
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Accelerate's own step() asks, each time, whether packages are installed that nobody has: half a millisecond.
        self._optimizer = optimizer if accelerator.scaler is not None else optimizer.optimizer
        self._loss = loss
        self._augment = augment
        self._buffers = buffers
        self._seed = seed
        self._watchdog = watch
        self.communication = communication
        self._clip_grad_norm = clip_grad_norm
        self._reduction = reduction
        self._world_size = accelerator.num_processes
        self._uses_ddp = self._world_size > 1 and reduction is None
        if self._uses_ddp:  # the backward pass comes to the first weight last: then only the other ranks are waited for
            self._parameters[0].register_post_accumulate_grad_hook(lambda _: communication.begin())
        self._skips_on_device = skips_on_device(self._optimizer)
        self._batches: dict[int, Tensor] = {}
        self._norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS) and module.training]

    def __call__(
        self,
        shards: Sequence[Shard],
        step: int,
        epoch: int,
        global_size: int,
        num_shards: int,
    ) -> StepOutcome:
        """Takes the step, unless loss or gradient are not finite. The gradient stays until the next step.

        global_size, num_shards: samples and shards of the batch on all ranks together, none of the shards empty.
        """
        for parameter in self._parameters:
            parameter.grad = None
        self._buffers.begin()
        if self._reduction is None:
            (shard,) = shards
            results = [self._one(shard, step, epoch, global_size, num_shards)]
        else:
            results = self._some(self._reduction, shards, step, epoch, global_size, num_shards)
        if num_shards < self._world_size and self._buffers.counters.numel():
            # Ranks without a sample have not counted this step.
            self.communication.begin()
            torch.distributed.all_reduce(self._buffers.counters, torch.distributed.ReduceOp.MAX)
            self.communication.end()
        norm = self._gradient_norm()
        return StepOutcome(results, self._update(results, norm), norm)

    def _one(self, shard: Shard, step: int, epoch: int, global_size: int, num_shards: int) -> ShardResult:
        """DDP takes the mean of the ranks' gradients. With each loss SUM scaled by world size / global_size that mean
        is the gradient of the mean loss of the global batch, however unevenly the batch is cut."""
        if not shard.weight:  # what an idle rank runs must not enter the statistics
            self._set_norms(training=False)
        loss_sum, logits = self._forward(shard, step, epoch)
        self._backward(loss_sum, self._world_size / global_size)
        if self._uses_ddp:
            self._check_all_took_part()
            self.communication.end()
            self._average_moves(shard.weight, num_shards)
        if not shard.weight:
            self._set_norms(training=True)
        return ShardResult(loss_sum.detach(), logits.detach(), shard.own.labels, shard.weight)

    def _check_all_took_part(self) -> None:
        """Raises TrainingError where a weight has no gradient: DDP has then not exchanged all of the others."""
        if any(parameter.grad is None for parameter in self._parameters):
            idle = [
                name.removeprefix("module.")
                for name, weight in self._model.named_parameters()
                if weight.requires_grad and weight.grad is None
            ]
            more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
            raise TrainingError(
                f"weights {', '.join(idle[:3])}{more} took no part in the loss, which DDP does not allow; set "
                f"train.virtual_ranks={self._world_size}, which does without DDP, or name them in model.freeze if they "
                "never take part"
            )

    def _some(
        self, reduction: OrderedReduction, shards: Sequence[Shard], step: int, epoch: int, size: int, num_shards: int
    ) -> list[ShardResult]:
        reduction.begin(num_shards)
        results = []
        for shard in shards:
            reduction.begin_shard(shard.number, is_last=shard is shards[-1])
            loss_sum, logits = self._forward(shard, step, epoch)
            reduction.forward_done()
            self._backward(loss_sum, 1 / size)
            reduction.end_shard()
            results.append(ShardResult(loss_sum.detach(), logits.detach(), shard.own.labels, shard.weight))
        self._watchdog.heartbeat(step, "backward pass")  # the others', where this rank had no shard
        reduction.finish()
        return results

    def _forward(self, shard: Shard, step: int, epoch: int) -> tuple[Tensor, Tensor]:
        """The loss sum, float [], and the logits, float [B, num_classes], of a shard."""
        self._watchdog.heartbeat(step, "forward pass")
        torch.manual_seed(rng.key(self._seed, step, "dropout", shard.number) >> 1)
        own, partners = shard.own, shard.partners
        batch = self._batch(0, own)
        if partners is None:
            logits = self._model(batch)
            loss_sum = self._loss.sum(logits, own.labels)
        else:
            others = self._batch(1, partners)
            batch, share = self._augment.mix(batch, others, own.ids, epoch)
            logits = self._model(batch)
            losses = share * self._loss(logits, own.labels) + (1 - share) * self._loss(logits, partners.labels)
            loss_sum = losses.sum()
        if shard.weight != 1:
            loss_sum = loss_sum * shard.weight
        self._watchdog.heartbeat(step, "backward pass")
        return loss_sum, logits

    def _batch(self, index: int, samples: Samples) -> Tensor:
        """The network's input: float32 [B, C, H, W], in the same memory at every step. Fresh memory costs as much as
        what is written into it. index: 0 for the samples themselves, 1 for what they are mixed with."""
        images, batch = samples.images, self._batches.get(index)
        if batch is None or len(batch) < len(images) or batch.shape[1:] != images.shape[1:]:
            batch = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
            self._batches[index] = batch
        return self._augment.normalize(images, out=batch[: len(images)])

    def _backward(self, loss_sum: Tensor, scale: float) -> None:
        """A loss that is not finite makes every gradient so: the gradients' sum then tells all ranks."""
        self._accelerator.backward(loss_sum * (scale + 0.0 * loss_sum.detach()))

    def _average_moves(self, weight: float, active: int) -> None:
        """The mean of the buffers' moves on the ranks that had samples becomes the move of all."""
        if not self._buffers.floats.numel():
            return
        moves = torch.empty_like(self._buffers.floats)
        self._buffers.moves(out=moves)
        moves *= weight
        self.communication.begin()
        torch.distributed.all_reduce(moves)
        self.communication.end()
        self._buffers.move(moves, active)

    def _gradient_norm(self) -> Tensor:
        """The Euclidean norm of the gradient, float []: not finite where a loss or a part of the gradient is not. Clips
        the gradient, where that is asked for."""
        if self._clip_grad_norm is not None:
            self._accelerator.unscale_gradients()
            # Accelerate's own would import tensors that are spread over devices, for a second.
            return nn.utils.clip_grad_norm_(self._parameters, self._clip_grad_norm)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        scaler = self._accelerator.scaler
        return norm if scaler is None else norm / scaler.get_scale()

    def _update(self, results: Sequence[ShardResult], norm: Tensor) -> Tensor:
        """Makes the update if the gradient is finite. Returns float32 [], 1 if it was not.

        Fused optimizers decide on the device, which is not waited for; others are called only where the gradient is
        finite. With fp16 a gradient that overflows is an everyday matter of the loss scale, which is lowered for it.
        """
        skipped = norm.isfinite().logical_not().float()
        scaler = self._accelerator.scaler
        if scaler is None and self._skips_on_device:
            self._optimizer.found_inf = skipped
            self._optimizer.step()
            self._buffers.rewind(where=skipped)
            return skipped
        if not skipped:  # the same on all ranks, as the gradient is
            self._optimizer.step()
            return skipped
        self._buffers.rewind(where=skipped)
        if scaler is None:
            return skipped
        if scaler.get_scale() > 1 and self._is_finite_everywhere(results):
            self._optimizer.step()  # skipped, by the scaler
            return torch.zeros_like(skipped)
        scaler.update(scaler.get_scale())  # forgets this step
        return skipped

    def _is_finite_everywhere(self, results: Sequence[ShardResult]) -> bool:
        finite = torch.ones((), dtype=torch.int32, device=self._accelerator.device)
        for result in results:
            finite *= result.loss_sum.isfinite()
        if self._world_size > 1:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return bool(finite)

    def _set_norms(self, training: bool) -> None:
        for module in self._norms:
            module.train(training)


# Loss sums are rounded to multiples of this, so that float64 adds them without error in any order up to 2**29: what
# a line of metrics says depends neither on the number of ranks nor on where a run was interrupted.
_LOSS_QUANTUM = 2.0**-24


def quantize_losses(losses: Tensor) -> Tensor:
    return (losses.double() / _LOSS_QUANTUM).round() * _LOSS_QUANTUM
