"""Forms the process group, creates the Accelerator, and offers the collectives that the trainer uses.

Only this file creates an Accelerator. It refuses to start when processes that were launched together do not form one
group: each of them would train the whole run alone, and all would write to the same run folder.
"""

import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping
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
from trainer.distributed.accelerate_options import read_accelerate_options
from trainer.distributed.device import choose_kernels, resolve_precision, resolve_threads, use_gpu
from trainer.distributed.environment import (
    RankEnvironment,
    available_cores,
    read_environment,
    remove_other_launchers,
    store_address,
)
from trainer.distributed.rendezvous import agree_on_attempt_id
from trainer.errors import PeerError, UserError, WorldError
from trainer.text.escape import one_line, shorten

T = TypeVar("T")

_RENDEZVOUS_TIMEOUT = timedelta(minutes=2)  # for all ranks to arrive: a rank that failed at its start never does
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # for one collective: the other ranks wait while rank 0 decodes a data set
# The watchdog ends ranks that hang, and knows a suspended rank, for which a collective may have to wait for long.
_WATCHED_TIMEOUT = timedelta(days=7)
# The group forms under the short timeout and then gets the long one. torch before 2.15 cannot change the timeout.
_CAN_SET_TIMEOUT = hasattr(torch.distributed, "set_timeout")
_GROUP_TIMEOUT = _RENDEZVOUS_TIMEOUT if _CAN_SET_TIMEOUT else _COLLECTIVE_TIMEOUT
_POLL_SECONDS = 0.01
_LOST_STORE = re.compile("likely closed|reset by peer|Broken pipe")
_LOOPBACK_INTERFACES = ("lo", "lo0")  # Linux, macOS
_SHOWN_DIFFERENCES, _SHOWN_CHARACTERS = 3, 80


class World:
    """This process's rank, device and precision, and the collectives over all ranks.

    Only World reads the rank from the environment; other code receives a World.
    """

    def __init__(self, train: TrainSettings) -> None:
        """Chooses the device and joins the process group.

        Raises WorldError if processes, device or precision are not as the settings and the launcher require.
        Raises PeerError if the ranks have met but cannot reach each other.
        """
        env = read_environment()
        options = read_accelerate_options(train)
        on_gpu = use_gpu(train.device, env, options.use_cpu)
        self.precision = resolve_precision(train.precision, on_gpu, options.precision)
        self.threads = resolve_threads(train.threads_per_rank, env.local_world_size)
        if env.rank == 0:
            for line in options.ignored:
                print(f"samecurve: {line}", file=sys.stderr, flush=True)
        # A convolution over one channel has weights with two equivalent layouts; DDP warns, but copies correctly.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        if on_gpu:
            choose_kernels(train.virtual_ranks is not None, self.precision)
        else:
            memory.keep_freed_memory()
        _prepare_variables(env, self.threads)
        self.attempt_id, self.accelerator = _create_accelerator(on_gpu, self.precision, env)
        # Launchers set OMP_NUM_THREADS=1, and without a launcher accelerate sets its own number.
        torch.set_num_threads(self.threads)
        self.rank = self.accelerator.process_index
        self.size = self.accelerator.num_processes
        self._local_rank = env.local_rank
        self.device = self.accelerator.device
        self.is_rank0 = self.rank == 0
        _check_group(env, self.size)
        self._cpu_group: Any = None
        if self.size > 1:
            timeout = _WATCHED_TIMEOUT if train.hang_timeout_seconds else _COLLECTIVE_TIMEOUT
            if on_gpu:
                self._cpu_group = _create_cpu_group(self.device)
                _set_collective_timeout(timeout, self._cpu_group)
            _set_collective_timeout(timeout)

    def raise_together(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns its result.

        If `work` raises UserError on any rank, all ranks raise the error of the lowest such rank. A rank that failed
        alone would leave the others waiting in their next collective.
        """
        result, error = None, None
        try:
            result = work()
        except UserError as own_error:
            error = own_error
        if self.size > 1:
            errors = gather_object([error])
            error = next((rank_error for rank_error in errors if rank_error is not None), None)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank in three turns and returns its result.

        Rank 0 downloads and decodes alone. Then the first rank of each other machine follows, whose disk may be
        another. Then all other ranks follow, and find the files ready. Errors are as in `raise_together`.
        """
        own_turn = 0 if self.is_rank0 else 1 if self._local_rank == 0 else 2
        result: T | None = None
        for turn in range(3 if self.size > 1 else 1):
            turn_result = self.raise_together(lambda turn=turn: work() if turn == own_turn else None)  # type: ignore[misc]
            result = turn_result if turn == own_turn else result
        return result  # type: ignore[return-value]

    def check_equal(
        self, name: str, value: str | Mapping[str, object], advice: str = "Start all ranks with the same command"
    ) -> None:
        """Raises WorldError on every rank unless all ranks have the same value.

        name: what the message calls it. value: a mapping's first differing entries are part of the message.
        """
        values = gather_object([value]) if self.size > 1 else [value]
        odd_rank = next((rank for rank, rank_value in enumerate(values) if rank_value != values[0]), None)
        if odd_rank is not None:
            differences = _describe_differences(values[0], values[odd_rank], odd_rank)
            raise WorldError(f"rank {odd_rank} differs from rank 0 in its {name}{differences}. {advice}")

    def hosts_where(self, condition: bool) -> list[str]:
        """Returns the hosts of the ranks on which `condition` is true, sorted. A collective: call it on every rank."""
        host = socket.gethostname() if condition else ""
        hosts = gather_object([host]) if self.size > 1 else [host]
        return sorted(set(hosts) - {""})

    def broadcast_from_rank0(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 only and returns its result on every rank. Errors are as in `raise_together`."""
        result = self.raise_together(lambda: work() if self.is_rank0 else None)
        return broadcast_object_list([result])[0] if self.size > 1 else result  # type: ignore[return-value]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Adds the ranks' tensors in place and returns the sum. Shape and dtype must be equal on all ranks."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, values: list[float]) -> list[float]:
        """Returns each value's maximum over the ranks. Waits for the other ranks, but not for this rank's GPU."""
        if self.size == 1:
            return values
        maxima = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX, group=self._cpu_group)
        return maxima.tolist()

    def broadcast_module(self, module: nn.Module) -> None:
        """Copies rank 0's weights and buffers to every rank, as DDP does when it wraps a network."""
        if self.size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Destroys the process group. Without this, gloo's threads abort one process in three at its exit.

        After a defect on a GPU the group stays: NCCL would wait for collectives that never end.
        """
        if self.device.type == "cpu" or kind is None or issubclass(kind, UserError):
            PartialState().destroy_process_group()

    def describe(self) -> dict[str, object]:
        """Returns the entries of environment.json about ranks and devices. A collective: call it on every rank."""
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


def _describe_differences(first: object, other: object, rank: int) -> str:
    """Returns the first entries in which two mappings differ; empty for other values."""
    if not isinstance(first, Mapping) or not isinstance(other, Mapping):
        return ""
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    shown = [
        f"{name} is {shorten(str(first.get(name)), _SHOWN_CHARACTERS)} on rank 0 and "
        f"{shorten(str(other.get(name)), _SHOWN_CHARACTERS)} on rank {rank}"
        for name in names[:_SHOWN_DIFFERENCES]
    ]
    return f" ({'; '.join(shown)}{'; ...' if len(names) > len(shown) else ''})"


def _create_cpu_group(gpu: torch.device) -> Any:
    """Returns a gloo group, for values that the CPU needs before the GPUs finish their queued work.

    Also makes NCCL connect, which it does at its first collective. The connection gets the rendezvous timeout: a later
    collective may wait 30 minutes for a slow rank, a connection may not.

    Raises PeerError if the ranks cannot connect.
    """
    # 0.9: at the full timeout NCCL itself aborts the process.
    deadline = time.monotonic() + 0.9 * _RENDEZVOUS_TIMEOUT.total_seconds()
    try:
        cpu_group = torch.distributed.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
        torch.distributed.all_reduce(torch.zeros(1, device=gpu))
        connected = torch.cuda.Event()
        connected.record()
        while not connected.query():
            if time.monotonic() > deadline:
                raise RuntimeError("timeout")
            time.sleep(_POLL_SECONDS)
    except RuntimeError as error:
        raise PeerError(
            f"the ranks have met, but cannot send data to each other ({one_line(error)}). Run samecurve doctor to find "
            "the GPUs or machines that fail to connect"
        ) from None
    return cpu_group


def _set_collective_timeout(timeout: timedelta, group: Any = None) -> None:
    """Gives a formed group, by default the group of all ranks, the timeout of collectives."""
    if _CAN_SET_TIMEOUT:
        torch.distributed.set_timeout(timeout, group)


def _prepare_variables(env: RankEnvironment, threads: int) -> None:
    """Removes or corrects variables that Accelerate, gloo and OpenMP would read."""
    remove_other_launchers()
    if env.world_size == 1:
        return
    if not os.environ.get("OMP_NUM_THREADS", "").isdecimal():  # Accelerate reads it as a number
        os.environ["OMP_NUM_THREADS"] = str(threads)
    interfaces = [name for _, name in socket.if_nameindex() if name in _LOOPBACK_INTERFACES]
    if env.is_one_machine and interfaces:  # gloo would look up the machine's own name, which no server may know
        os.environ["GLOO_SOCKET_IFNAME"] = interfaces[0]


def _create_accelerator(on_gpu: bool, precision: str, env: RankEnvironment) -> tuple[str, Accelerator]:
    """Forms the process group; returns the attempt id ("" without a launcher's store) and the Accelerator.

    Raises WorldError if some processes never arrive, PeerError if those that arrive cannot form a group, or if the
    launcher whose store they use has gone.
    """
    start = time.monotonic()
    try:
        attempt_id = _form_group(on_gpu, env) if env.has_launcher_store else ""
        return attempt_id, Accelerator(
            cpu=not on_gpu,
            mixed_precision={"fp32": "no"}.get(precision, precision),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                # DDP need not broadcast rank 0's buffers before each step: step.py averages those of all ranks.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=_GROUP_TIMEOUT),
            ],
        )
    except (torch.distributed.DistError, TimeoutError) as error:
        if _LOST_STORE.search(str(error)):
            raise PeerError(f"the launcher of rank 0 ended before all processes had met ({one_line(error)})") from None
        raise WorldError(
            f"expected {env.world_size} processes, but not all arrived within "
            f"{time.monotonic() - start:.0f} s ({one_line(error)}). Check the output of the other processes and "
            "machines for their errors"
        ) from None
    except RuntimeError as error:
        if env.world_size == 1:
            raise
        raise PeerError(
            f"the {env.world_size} processes could not form a group ({one_line(error)}). Run samecurve "
            "doctor to find the GPUs or machines that fail to connect"
        ) from None


def _form_group(on_gpu: bool, env: RankEnvironment) -> str:
    """Forms the process group under keys of this attempt only (rendezvous.py); returns the attempt id.

    Accelerate uses a process group that exists already.
    """
    if on_gpu:
        torch.cuda.set_device(env.local_rank)
    store = TCPStore(*store_address(), is_master=False, wait_for_workers=False, timeout=_RENDEZVOUS_TIMEOUT)
    attempt_id = agree_on_attempt_id(
        PrefixStore("samecurve", store), env.rank, env.world_size, _RENDEZVOUS_TIMEOUT.total_seconds()
    )
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore(f"samecurve/{attempt_id}", store),
        rank=env.rank,
        world_size=env.world_size,
        timeout=_GROUP_TIMEOUT,
    )
    return attempt_id


def _check_group(env: RankEnvironment, world_size: int) -> None:
    """Raises WorldError if the launcher started more processes than the group has, which would each train alone."""
    if env.world_size != world_size:
        raise WorldError(
            f"the launcher started {env.world_size} processes, but this one sees a group of {world_size}, so each "
            "would train alone. Start them with torchrun, or with accelerate launch --config_file and a file of "
            "launch/accelerate/"
        )
