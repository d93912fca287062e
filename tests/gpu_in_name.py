"""A GPU in name only, for machines without one: tensors that say they lie on it and have no memory.

PyTorch checks what it is asked for, shapes and devices, and computes nothing (its FakeTensorMode): what is read from
such a tensor is zero. What would keep the CPU waiting for a GPU is written down: reading a value, asking how many are
not zero, copies that are waited for. The driver's answers are made up, and so are gradients: PyTorch's own backward
pass asks the driver for streams.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
_TRAINER = str(Path(__file__).resolve().parents[1] / "trainer")
_ATEN = torch.ops.aten
_READ = _ATEN._local_scalar_dense.default
_READS = (_READ, _ATEN.nonzero.default, _ATEN.masked_select.default)
# They change what they are given, and PyTorch has no stand-in for them.
_IN_PLACE = (_ATEN._fused_sgd_.default, _ATEN._amp_foreach_non_finite_check_and_unscale_.default)


class _Event:
    """A mark among the GPU's work, or all of its work."""

    def __init__(self, **_: object) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return False

    def elapsed_time(self, last: "_Event") -> float:
        return 0.0


_DRIVER: dict[str, Any] = {
    "Event": _Event,
    "current_stream": _Event,
    "is_available": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "manual_seed_all": lambda seed: None,
    "get_device_name": lambda device=None: "a GPU in name",
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (1 << 40, 1 << 40),
    "max_memory_allocated": lambda device=None: 1 << 30,
}


class _Named(TorchDispatchMode):
    """Sees every call: those for the CPU are made as ever, those for the GPU go to FakeTensorMode."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        given = [value for value in tree_leaves((args, options)) if isinstance(value, Tensor)]
        device = torch.device(options.get("device") or (given[0].device if given else "cpu"))
        if device.type != "cuda" and not any(tensor.is_cuda for tensor in given):
            with _disable_current_modes():  # type: ignore[no-untyped-call]
                if options.pop("pin_memory", False):  # for what a GPU will write
                    return call(*args, **options).zero_()
                return call(*args, **options)
        if _is_waited_for(call, args, options):
            lines = [line for line in traceback.extract_stack() if line.filename.startswith(_TRAINER)]
            self._waits.append(f"{call} at {lines[-1].filename}:{lines[-1].lineno}" if lines else str(call))
        if call is _READ:
            return False if args[0].dtype is torch.bool else 0.0 if args[0].is_floating_point() else 0
        if call is _ATEN._to_copy.default and device.type == "cpu":
            with _disable_current_modes():  # type: ignore[no-untyped-call]
                return torch.zeros(args[0].shape, dtype=options.get("dtype") or args[0].dtype)
        if call is _ATEN.copy_.default and not args[0].is_cuda:
            return args[0]
        if call in _IN_PLACE:
            assert all(tensor.is_cuda for tensor in given), f"{call} was given tensors of the CPU too"
            return None
        return call(*args, **options)


def _is_waited_for(call: Any, args: Any, options: dict[str, Any]) -> bool:
    if call is _ATEN._to_copy.default:
        source, target = args[0].device, torch.device(options.get("device") or args[0].device)
    elif call is _ATEN.copy_.default:
        target, source = args[0].device, args[1].device
    else:
        return call in _READS
    is_asked_to = not (options.get("non_blocking") or args[2:3] == (True,))
    return source.type != target.type and is_asked_to


@contextlib.contextmanager
def gpu_in_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, this machine has a GPU. Yields what would have waited for it, as it happens."""
    waits: list[str] = []
    for name, answer in _DRIVER.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    for caller in ("trainer.uncompiled", "torch.autograd"):
        monkeypatch.setattr(f"{caller}._engine_run_backward", _leave_gradients)
    # It would begin with a real tensor wherever there seems to be a driver.
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)
    with FakeTensorMode(allow_non_fake_inputs=True), _Named(waits):
        yield waits


def _leave_gradients(results: tuple[Tensor], gradients: tuple[Tensor], *_: object, **__: object) -> None:
    """Some, of their shape, for all weights that the results came from."""
    assert all(tensor.is_cuda for tensor in (*results, *gradients))
    waiting, seen = [result.grad_fn for result in results], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        if isinstance(weight := getattr(node, "variable", None), Tensor):
            weight.grad = torch.empty_like(weight)
