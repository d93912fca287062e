"""The processes of this run: the Accelerator, ranks; sums, agreement, who prints.

Only this file makes an Accelerator. It refuses to start as N strangers: processes that were launched together and do
not form one group would each train the whole run and write over each other.
"""

import os
import socket
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from trainer import memory
from trainer.config.schema import TrainSettings
from trainer.distributed.device import choose_kernels, resolve_precision, resolve_threads, use_gpu
from trainer.distributed.environment import RankEnvironment, available_cores, read_environment, store_address
from trainer.distributed.rendezvous import agree_on_attempt_id
from trainer.errors import PeerError, UserError, WorldError

T = TypeVar("T")

_MEET_TIMEOUT = timedelta(minutes=2)  # for all ranks to be there: one that failed at its start never comes
_EXCHANGE_TIMEOUT = timedelta(minutes=30)  # for one exchange: the others wait while rank 0 decodes a data set
# A group is formed under the short timeout, then given the long one; before torch 2.15 it has the long one at once.
_CAN_SET_TIMEOUT = hasattr(torch.distributed, "set_timeout")
_GROUP_TIMEOUT = _MEET_TIMEOUT if _CAN_SET_TIMEOUT else _EXCHANGE_TIMEOUT
_POLL_SECONDS = 0.01
# accelerate lets these win over what it is called with; launch sets them from a file in the user's home folder.
_OVERRULING = (
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE",
    "ACCELERATE_USE_CPU",
)  # fmt: skip


class World:
    """Handed to whoever needs it; nobody else asks for a rank."""

    def __init__(self, train: TrainSettings) -> None:
        """Raises WorldError when the processes, devices or precision are not what was asked for, PeerError when those
        that have met cannot reach each other."""
        env = read_environment()
        on_gpu = use_gpu(train.device, env)
        self.precision = resolve_precision(train.precision, on_gpu)
        self.threads = resolve_threads(train.threads_per_rank, env.local_world_size)
        # Of a convolution over one channel, whose weights have two layouts that are the same.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        if on_gpu:
            choose_kernels(train.virtual_ranks is not None, self.precision)
        else:
            memory.keep()
        self.attempt_id, self.accelerator = _accelerator(on_gpu, self.precision, env)
        # Whatever OMP_NUM_THREADS a launcher left behind, and whatever accelerate set where none did.
        torch.set_num_threads(self.threads)
        self.rank = self.accelerator.process_index
        self.size = self.accelerator.num_processes
        self._local_rank = env.local_rank
        self.device = self.accelerator.device
        self.is_rank0 = self.rank == 0
        _check_group(env, self.size)
        self._control: Any = None
        if self.size > 1:
            if on_gpu:
                self._control = _connect(self.device)
                _allow_exchange_timeout(self._control)
            _allow_exchange_timeout()

    def raise_together(self, work: Callable[[], T]) -> T:
        """Every rank does `work`; where it raises UserError on any, all raise that of the lowest such rank.

        A rank that failed alone would leave the others waiting for it in their next exchange.
        """
        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = error
        if self.size > 1:
            problems = gather_object([problem])
            problem = next((found for found in problems if found is not None), None)
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Rank 0 does `work` alone (downloads, decodes), then the first rank of each other machine, whose disk may be
        another, then all the rest, who find it done; errors as above."""
        own_turn = 0 if self.is_rank0 else 1 if self._local_rank == 0 else 2
        result: T | None = None
        for turn in range(3 if self.size > 1 else 1):
            done = self.raise_together(lambda turn=turn: work() if turn == own_turn else None)  # type: ignore[misc]
            result = done if turn == own_turn else result
        return result  # type: ignore[return-value]

    def check_equal(self, what: str, value: str) -> None:
        """Raises WorldError on every rank unless all have the same value."""
        values = gather_object([value]) if self.size > 1 else [value]
        odd = next((rank for rank, other in enumerate(values) if other != values[0]), None)
        if odd is not None:
            raise WorldError(f"rank {odd} was started with other {what} than rank 0; start all with the same command")

    def broadcast_from_rank0(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; errors as above. Only rank 0 does it."""
        result = self.raise_together(lambda: work() if self.is_rank0 else None)
        return broadcast_object_list([result])[0] if self.size > 1 else result  # type: ignore[return-value]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors added, on every rank; any shape and dtype, all the same."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, values: list[float]) -> list[float]:
        """The largest of each value over the ranks, on every rank. It waits for the ranks, but for no GPU."""
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self._control)
        return found.tolist()

    def broadcast_module(self, module: nn.Module) -> None:
        """Rank 0's weights and buffers, on every rank, as DDP does when it wraps a network."""
        if self.size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leaves the group: gloo's threads abort a process, one time in three, that ends without it.

        After a defect on a GPU it is left as it is: NCCL would wait for collectives that never end.
        """
        if self.device.type == "cpu" or kind is None or issubclass(kind, UserError):
            PartialState().destroy_process_group()

    def describe(self) -> dict[str, object]:
        """For environment.json: what this run computes on."""
        backend = torch.distributed.get_backend() if self.size > 1 else None
        return {
            "world_size": self.size,
            "hosts": sorted(set(gather_object([socket.gethostname()]))) if self.size > 1 else [socket.gethostname()],
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "backend": backend,
            "precision": self.precision,
            "threads_per_rank": self.threads,
            "cores": available_cores(),
        }


def _connect(gpu: torch.device) -> Any:
    """A group for numbers that the CPU must know at once: they need not wait for what the GPUs have queued.

    NCCL makes its connections at the first exchange, which is this one: it may take as long as a meeting, and not as
    long as an exchange, which others may come late to. Raises PeerError.
    """
    until = time.monotonic() + 0.9 * _MEET_TIMEOUT.total_seconds()  # then NCCL itself would abort the process
    try:
        control = torch.distributed.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
        torch.distributed.all_reduce(torch.zeros(1, device=gpu))
        done = torch.cuda.Event()
        done.record()
        while not done.query():
            if time.monotonic() > until:
                raise RuntimeError("nothing came")
            time.sleep(_POLL_SECONDS)
    except RuntimeError as error:
        raise PeerError(
            f"the ranks have met, but cannot send numbers to each other ({_short(error)}); samecurve doctor looks for "
            "the GPUs or machines between which that fails"
        ) from None
    return control


def _allow_exchange_timeout(group: Any = None) -> None:
    """Lets an exchange of a group, by default of all ranks, take as long as it may."""
    if _CAN_SET_TIMEOUT:
        torch.distributed.set_timeout(_EXCHANGE_TIMEOUT, group)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _accelerator(on_gpu: bool, precision: str, env: RankEnvironment) -> tuple[str, Accelerator]:
    """The word that the ranks have agreed on, and the Accelerator, with it the group. Raises WorldError when not all
    processes come, PeerError when those that have come fail."""
    for name in _OVERRULING:
        os.environ.pop(name, None)
    try:
        word = _meet(on_gpu, env) if env.keeps_store else ""
        return word, Accelerator(
            cpu=not on_gpu,
            mixed_precision={"fp32": "no"}.get(precision, precision),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                # Rank 0's buffers are not sent around before each step: what all ranks saw is averaged (step.py).
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=_GROUP_TIMEOUT),
            ],
        )
    except (torch.distributed.DistError, TimeoutError) as error:
        raise WorldError(
            f"not all {env.announced_world_size} processes met within {_MEET_TIMEOUT.seconds} s ({_short(error)}); "
            "look at what the other machines say"
        ) from None
    except RuntimeError as error:
        if env.announced_world_size == 1:
            raise
        raise PeerError(
            f"the {env.announced_world_size} processes could not form a group ({_short(error)}); samecurve doctor "
            "looks for the GPUs or machines at fault"
        ) from None


def _meet(on_gpu: bool, env: RankEnvironment) -> str:
    """The group, under keys that only this attempt's ranks know (meeting.py); accelerate takes one that is there."""
    if on_gpu:
        torch.cuda.set_device(env.local_rank)
    store = TCPStore(*store_address(), is_master=False, wait_for_workers=False, timeout=_MEET_TIMEOUT)
    word = agree_on_attempt_id(
        PrefixStore("samecurve", store), env.rank, env.announced_world_size, _MEET_TIMEOUT.total_seconds()
    )
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore(f"samecurve/{word}", store),
        rank=env.rank,
        world_size=env.announced_world_size,
        timeout=_GROUP_TIMEOUT,
    )
    return word


def _check_group(env: RankEnvironment, size: int) -> None:
    if env.announced_world_size != size:
        raise WorldError(
            f"the launcher started {env.announced_world_size} processes but this one sees a group of {size}: "
            "they would train apart. Start them with torchrun, or with accelerate launch "
            "--config_file launch/accelerate/multi_cpu.yaml (or another file of that folder)"
        )
    if env.lost_siblings:
        raise WorldError(
            "the launcher was asked for several processes (it set MASTER_PORT) but started one: accelerate's --cpu "
            "does that. Use torchrun --nproc_per_node N, or accelerate launch --config_file "
            "launch/accelerate/multi_cpu.yaml --num_processes N"
        )
