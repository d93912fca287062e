"""Chooses a rank's device, precision, thread count and GPU kernels from the settings, the launcher and the machine."""

import contextlib
import os
import sys
from pathlib import Path

import torch

from trainer.config.validate import check_precision
from trainer.distributed.environment import RankEnvironment, available_cores
from trainer.errors import WorldError

_DEVICE_FILES = Path("/dev")


def use_gpu(device: str, env: RankEnvironment, launcher_wants_cpu: bool) -> bool:
    """Returns whether to train on a GPU; prints a line if a GPU stays idle although no setting forbids it.

    device: train.device. launcher_wants_cpu: accelerate launch is set to use the CPU.
    Raises WorldError if the setting, the launcher and the machine contradict each other.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and launcher_wants_cpu:
        raise WorldError(
            "train.device=cuda, but accelerate launch is set to use the CPU (--cpu, or use_cpu in its config file). "
            "Remove one of the two"
        )
    if device == "cuda" and not num_gpus:
        raise WorldError("train.device=cuda: this machine has no usable GPU. Set train.device=auto or fix its driver")
    if device == "cpu":
        return False
    if launcher_wants_cpu or not num_gpus:
        reason = "accelerate launch is set to use the CPU" if num_gpus else _reason_gpu_is_unusable()
        if reason and env.local_rank == 0:
            print(f"samecurve: this machine has a GPU, but {reason}; training on the CPU", file=sys.stderr, flush=True)
        return False
    if env.local_world_size > num_gpus:
        visible, fix = f"{num_gpus} GPUs", f"Start {num_gpus} processes"
        if num_gpus == 1:
            visible, fix = "1 GPU", "Start 1 process, make all GPUs visible to each process instead of only its own"
        raise WorldError(
            f"{env.local_world_size} ranks on this machine, but a rank sees {visible}: expected one GPU per rank. "
            f"{fix}, or train on the CPU with train.device=cpu"
        )
    return True


def _reason_gpu_is_unusable() -> str:
    """Returns why PyTorch cannot use a GPU that this process can open, or "" if there is no such GPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:  # the user or a scheduler chose the GPUs, maybe none
        return ""
    for file in sorted(_DEVICE_FILES.glob("nvidia[0-9]*")):
        # A container or a job without GPUs sees the files of its machine's GPUs, but cannot open them.
        with contextlib.suppress(OSError):
            os.close(os.open(file, os.O_RDWR))
            build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            return f"PyTorch {torch.__version__}, {build}, cannot use {file} (its driver may be too old)"
    return ""


def resolve_precision(precision: str, on_gpu: bool, launcher_precision: str | None) -> str:
    """Returns "fp32", "bf16" or "fp16".

    precision: train.precision. launcher_precision: bf16 or fp16 if accelerate launch asks for it; counts for auto.
    Raises WorldError if the device does not support it.
    """
    source = f"train.precision={precision}"
    if precision == "auto" and launcher_precision:
        precision, source = launcher_precision, f"accelerate launch --mixed_precision {launcher_precision}"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_multiplies_bf16()
    if precision == "auto":
        return "bf16" if has_bf16 else "fp16" if on_gpu else "fp32"
    check_precision(precision, on_gpu, source)
    if precision == "bf16" and on_gpu and not has_bf16:
        gpu = torch.cuda.get_device_name()
        raise WorldError(f"{source}: {gpu} does not support it; set train.precision to fp32 or fp16")
    return precision


def _cpu_multiplies_bf16() -> bool:
    """Returns whether the CPU has bf16 units (AMX). Other CPUs emulate bf16 in fp32, at several times the cost."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def resolve_threads(threads_per_rank: int | str, local_world_size: int) -> int:
    """Returns the number of threads of a rank. threads_per_rank: the setting, a number or "auto"."""
    if isinstance(threads_per_rank, int):
        return threads_per_rank
    return max(1, available_cores() // local_world_size)


def choose_kernels(exact: bool, precision: str) -> None:
    """Sets how PyTorch chooses GPU kernels.

    exact: True for kernels that give the same bits in every run; False for the fastest ones, which PyTorch finds by
    trial and which may differ from run to run.
    """
    torch.backends.cudnn.benchmark = not exact
    if precision == "fp32":  # by default PyTorch keeps 10 of 23 mantissa bits in convolutions (TF32)
        torch.backends.cudnn.allow_tf32 = False
    if exact:
        # Deterministic mode would fill all new memory, a debugging aid that costs time at each allocation.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
