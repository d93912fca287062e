"""Runs one optimizer step: forward and backward passes over this rank's shards, gradient reduction, update.

Without virtual ranks a rank has one shard, its slice of the global batch, and DDP averages the gradients. With virtual
ranks a rank runs any number of shards one after another, and ordered_reduce.py sums their gradients in an order that
does not depend on the number of ranks. In both modes all ranks hold the same weights, buffers and optimizer state after
each step.
"""

import math
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
from trainer.optim.losses import SampleLoss, quantize_losses
from trainer.optim.optimizers import supports_found_inf
from trainer.run.watchdog import NullWatchdog
from trainer.timer import Timer


class ShardResult(NamedTuple):
    """Loss and logits of one shard, on the device."""

    loss_sum: Tensor
    """float []"""
    logits: Tensor
    """float [B, num_classes]"""
    labels: Tensor
    """int64 [B]"""
    weight: float
    """1, or 0 for the placeholder shard of a rank without samples"""


class StepOutcome(NamedTuple):
    """Results of one step on this rank, on the device: creating it does not wait for a GPU."""

    results: list[ShardResult]
    skipped: Tensor
    """float32 []; 1 if loss or gradient was not finite on any rank, so that nothing changed; otherwise 0"""
    grad_norm: Tensor | None = None
    """float []; Euclidean norm of the mean gradient over all trained weights, before clipping; not finite if the step
    was skipped"""

    def loss_sum(self) -> Tensor:
        """Returns this rank's loss sum, float64 []: 0 on a rank without a shard, and possibly not finite."""
        total = self.skipped.new_zeros((), dtype=torch.float64)
        for result in self.results:
            total = total + quantize_losses(result.loss_sum)
        return total


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Step:
    """Takes optimizer steps. Every rank makes the same calls, also a rank without samples."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        loss: SampleLoss,
        augment: Augment,
        buffers: Buffers,
        seed: int,
        watchdog: NullWatchdog,
        communication: Timer,
        clip_grad_norm: float | None = None,
        reduction: OrderedReduction | None = None,
    ) -> None:
        """model: the prepared network; a DDP module if there are several ranks and no `reduction`.
        communication: measures the time for which a step waits for other ranks.
        reduction: sums the gradients of virtual ranks; None without virtual ranks.
        """
        self._accelerator = accelerator
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Accelerate's step() looks for installed packages in each call, which takes half a millisecond.
        self._optimizer = optimizer if accelerator.scaler is not None else optimizer.optimizer
        self._loss = loss
        self._augment = augment
        self._buffers = buffers
        self._seed = seed
        self._watchdog = watchdog
        self.communication = communication
        self._clip_grad_norm = clip_grad_norm
        self._reduction = reduction
        self._world_size = accelerator.num_processes
        self._uses_ddp = self._world_size > 1 and reduction is None
        if self._uses_ddp:
            # The backward pass reaches the first weight last. From there on, a step only waits for the other ranks.
            self._parameters[0].register_post_accumulate_grad_hook(lambda _: communication.begin())
        self._supports_found_inf = supports_found_inf(self._optimizer)
        self._inputs: dict[int, Tensor] = {}
        self._norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS) and module.training]

    def __call__(
        self, shards: Sequence[Shard], step: int, epoch: int, global_batch_size: int, num_shards: int
    ) -> StepOutcome:
        """Takes one step, or skips it if loss or gradient is not finite. Gradients stay until the next step.

        shards: this rank's shards.
        global_batch_size: samples in the batch on all ranks together.
        num_shards: shards with samples on all ranks together.
        Raises TrainingError if DDP got no gradient for some weight.
        """
        for parameter in self._parameters:
            parameter.grad = None
        self._buffers.save()
        if self._reduction is None:
            (shard,) = shards
            results = [self._run_only_shard(shard, step, epoch, global_batch_size, num_shards)]
        else:
            results = self._run_shards(self._reduction, shards, step, epoch, global_batch_size, num_shards)
        if num_shards < self._world_size and self._buffers.counters.numel():
            # The counters of ranks without samples have not counted this step.
            self.communication.begin()
            torch.distributed.all_reduce(self._buffers.counters, torch.distributed.ReduceOp.MAX)
            self.communication.end()
        norm = self._clip_gradient()
        return StepOutcome(results, self._update(results, norm), norm)

    def _run_only_shard(
        self, shard: Shard, step: int, epoch: int, global_batch_size: int, num_shards: int
    ) -> ShardResult:
        """Runs this rank's shard without virtual ranks.

        DDP averages the ranks' gradients. Each rank scales its loss sum by world size / global batch size, so the
        average is the gradient of the global batch's mean loss, also if the shards differ in size.
        """
        if not shard.weight:  # the placeholder sample of a rank without samples must not change the statistics
            self._set_norms(training=False)
        loss_sum, logits = self._forward(shard, step, epoch)
        self._backward(loss_sum, self._world_size / global_batch_size)
        if self._uses_ddp:
            self._check_all_have_gradients()
            self.communication.end()
            self._average_buffer_changes(shard.weight, num_shards)
        if not shard.weight:
            self._set_norms(training=True)
        return ShardResult(loss_sum.detach(), logits.detach(), shard.samples.labels, shard.weight)

    def _check_all_have_gradients(self) -> None:
        """Raises TrainingError if a weight has no gradient: DDP has then not reduced all the others."""
        if any(parameter.grad is None for parameter in self._parameters):
            unused = [
                name.removeprefix("module.")
                for name, weight in self._model.named_parameters()
                if weight.requires_grad and weight.grad is None
            ]
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise TrainingError(
                f"DDP needs a gradient for every weight, but the loss does not depend on {', '.join(unused[:3])}{more}."
                f" Set train.virtual_ranks={self._world_size}, which does not use DDP, or list them in model.freeze if "
                "the loss never depends on them"
            )

    def _run_shards(
        self,
        reduction: OrderedReduction,
        shards: Sequence[Shard],
        step: int,
        epoch: int,
        global_batch_size: int,
        num_shards: int,
    ) -> list[ShardResult]:
        """Runs this rank's shards one after another, with virtual ranks."""
        reduction.begin(num_shards)
        results = []
        for shard in shards:
            reduction.begin_shard(shard.position, is_last=shard is shards[-1])
            loss_sum, logits = self._forward(shard, step, epoch)
            reduction.end_forward()
            self._backward(loss_sum, 1 / global_batch_size)
            reduction.end_shard()
            results.append(ShardResult(loss_sum.detach(), logits.detach(), shard.samples.labels, shard.weight))
        self._watchdog.heartbeat(step, "backward pass")  # a rank without shards waits for the other ranks' backward
        reduction.finish()
        return results

    def _forward(self, shard: Shard, step: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Returns a shard's loss sum, float [], and logits, float [B, num_classes]."""
        self._watchdog.heartbeat(step, "forward pass")
        self._seed_dropout(rng.key(self._seed, step, "dropout", shard.position) >> 1)
        samples, partners = shard.samples, shard.partners
        images = self._prepare_images(0, samples)
        if partners is None:
            logits = self._model(images)
            loss_sum = self._loss.sum(logits, samples.labels)
        else:
            partner_images = self._prepare_images(1, partners)
            images, share = self._augment.mix(images, partner_images, samples.ids, epoch)
            logits = self._model(images)
            losses = share * self._loss(logits, samples.labels) + (1 - share) * self._loss(logits, partners.labels)
            loss_sum = losses.sum()
        if shard.weight != 1:
            loss_sum = loss_sum * shard.weight
        self._watchdog.heartbeat(step, "backward pass")
        return loss_sum, logits

    def _seed_dropout(self, seed: int) -> None:
        """Seeds the generator of this rank's device. torch.manual_seed seeds all devices and takes 0.1 ms."""
        if self._accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _prepare_images(self, index: int, samples: Samples) -> Tensor:
        """Returns the normalized images, float32 [B, C, H, W], in memory that every step uses again.

        New memory costs as much as the values that are written to it.
        index: 0 for the samples, 1 for their mixing partners.
        """
        images, buffer = samples.images, self._inputs.get(index)
        if buffer is None or len(buffer) < len(images) or buffer.shape[1:] != images.shape[1:]:
            buffer = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
            self._inputs[index] = buffer
        return self._augment.normalize(images, out=buffer[: len(images)])

    def _backward(self, loss_sum: Tensor, scale: float) -> None:
        """Runs the backward pass. A loss that is not finite makes all gradients so: their sum shows it to all ranks."""
        self._accelerator.backward(loss_sum * (scale + 0.0 * loss_sum.detach()))

    def _average_buffer_changes(self, weight: float, num_shards: int) -> None:
        """Changes the buffers of all ranks by the mean of the changes on the ranks with samples."""
        if not self._buffers.floats.numel():
            return
        changes = torch.empty_like(self._buffers.floats)
        self._buffers.write_changes(out=changes)
        changes *= weight
        self.communication.begin()
        torch.distributed.all_reduce(changes)
        self.communication.end()
        self._buffers.apply_mean_change(changes, num_shards)

    def _clip_gradient(self) -> Tensor:
        """Clips the gradient if the settings ask for it, and returns its Euclidean norm before clipping, float [].

        The norm is not finite if any loss or any gradient is not.
        """
        if self._clip_grad_norm is not None:
            self._accelerator.unscale_gradients()
            # Accelerate's own function imports distributed tensors, which takes a second.
            return nn.utils.clip_grad_norm_(self._parameters, self._clip_grad_norm)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        # nn.utils.get_total_norm adds up the same numbers, but takes twice as long on a CPU.
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        scaler = self._accelerator.scaler
        return norm if scaler is None else norm / scaler.get_scale()

    def _update(self, results: Sequence[ShardResult], norm: Tensor) -> Tensor:
        """Updates the weights if the gradient is finite. Returns float32 []: 1 if the step was skipped.

        SGD, AdamW and Muon skip on the device, so the CPU does not wait for a GPU. For other optimizers, and with fp16,
        the CPU waits and calls the optimizer only if the gradient is finite. With fp16 an overflow of the gradient is
        normal: it lowers the loss scale and does not count as a skipped step.
        """
        skipped = (norm < math.inf).logical_not().float()  # NaN is not less either
        scaler = self._accelerator.scaler
        if scaler is None and self._supports_found_inf:
            self._optimizer.found_inf = skipped
            self._optimizer.step()
            self._buffers.restore(condition=skipped)
            return skipped
        if not skipped:  # equal on all ranks, because the gradient is
            self._optimizer.step()
            return skipped
        self._buffers.restore(condition=skipped)
        if scaler is None:
            return skipped
        if scaler.get_scale() > 1 and self._losses_are_finite(results):
            self._optimizer.step()  # an overflow: the scaler skips the update and lowers the scale
            return torch.zeros_like(skipped)
        scaler.update(scaler.get_scale())  # clears the overflow flag and keeps the scale
        return skipped

    def _losses_are_finite(self, results: Sequence[ShardResult]) -> bool:
        """Returns whether the losses of all shards on all ranks are finite."""
        is_finite = torch.ones((), dtype=torch.int32, device=self._accelerator.device)
        for result in results:
            is_finite *= result.loss_sum.isfinite()
        if self._world_size > 1:
            torch.distributed.all_reduce(is_finite, torch.distributed.ReduceOp.MIN)
        return bool(is_finite)

    def _set_norms(self, training: bool) -> None:
        for module in self._norms:
            module.train(training)
