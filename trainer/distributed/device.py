"""What a launcher has asked for and what the machine has in, what a rank computes with out: CPU or GPU, precision,
threads, kernels."""

import contextlib
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from trainer.distributed.environment import RankEnvironment, available_cores
from trainer.errors import WorldError

_GPU_FILES = Path("/dev")


def use_gpu(asked: str, env: RankEnvironment) -> bool:
    """asked: train.device. Raises WorldError where that, the launcher and the machine do not go together; says so where
    a GPU is left idle that nobody has forbidden."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_told_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if asked == "cuda" and is_told_cpu:
        raise WorldError(
            "train.device=cuda, but accelerate launch was told to use the CPU (its --cpu, or use_cpu in its file); "
            "leave out one of them"
        )
    if asked == "cuda" and not gpus:
        raise WorldError("train.device=cuda: this machine has no usable GPU; set train.device=auto or mend its driver")
    if asked == "cpu":
        return False
    if is_told_cpu or not gpus:
        why = "accelerate launch was told to use the CPU" if gpus else _why_unusable()
        if why and env.local_rank == 0:
            print(f"samecurve: there is a GPU, but {why}; training on the CPU", file=sys.stderr, flush=True)
        return False
    if env.local_world_size > gpus:
        seen, way = f"{gpus} GPUs", f"start {gpus} processes"
        if gpus == 1:
            seen, way = "one GPU", "start one process, or have each see all GPUs and not its own alone"
        raise WorldError(
            f"{env.local_world_size} ranks on this machine, which see {seen}: wanted one GPU a rank; {way}, or run on "
            "the CPU with train.device=cpu"
        )
    return True


def _why_unusable() -> str:
    """Why PyTorch does not use a GPU whose file this process can open; nothing where there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:  # which may mean none
        return ""
    for file in sorted(_GPU_FILES.glob("nvidia[0-9]*")):
        with contextlib.suppress(OSError):  # a container, or a job, that was given none of its machine's
            os.close(os.open(file, os.O_RDWR))
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "not built for CUDA"
            return f"PyTorch {torch.__version__}, {built}, cannot use {file} (an older driver?)"
    return ""


def resolve_precision(asked: str, on_gpu: bool) -> str:
    """The precision to train in; raises WorldError for one that the device lacks."""
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_multiplies_bf16()
    if asked == "auto":
        return "bf16" if has_bf16 else "fp16" if on_gpu else "fp32"
    if asked == "fp16" and not on_gpu:
        raise WorldError("train.precision=fp16: a CPU has no fp16 training; choose auto, fp32 or bf16")
    if asked == "bf16" and on_gpu and not has_bf16:
        raise WorldError(f"train.precision=bf16: {torch.cuda.get_device_name()} lacks it; choose auto, fp32 or fp16")
    return asked


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has units for it (AMX). Others make bf16 products of fp32 ones, at several times their cost."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def resolve_threads(asked: int | str, local_world_size: int) -> int:
    """Of a rank; asked: train.threads_per_rank."""
    return asked if isinstance(asked, int) else max(1, available_cores() // local_world_size)


def choose_kernels(exact: bool, precision: str) -> None:
    """Of a GPU: the fastest ones found by trying, another each time maybe; or those that give the same bits every
    time."""
    torch.backends.cudnn.benchmark = not exact
    if precision == "fp32":  # PyTorch multiplies 10 of 23 bits in convolutions unless it is told
        torch.backends.cudnn.allow_tf32 = False
    if exact:
        # A help for finding defects, at each allocation.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # wanted by cuBLAS for that
        torch.use_deterministic_algorithms(True, warn_only=True)
