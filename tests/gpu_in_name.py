"""A GPU in name only, for machines without one: tensors that say they lie on it and have no memory.

PyTorch checks what it is asked for, shapes and devices, and computes nothing (its FakeTensorMode). What would keep the
CPU waiting for a GPU is written down here: reading a value, asking how many are not zero, copies that are waited for.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
_TRAINER = str(Path(__file__).resolve().parents[1] / "trainer")
_ATEN = torch.ops.aten
_READS = (_ATEN._local_scalar_dense.default, _ATEN.nonzero.default, _ATEN.masked_select.default)
# They change what they are given, and PyTorch has no stand-in for them.
_IN_PLACE = (_ATEN._fused_sgd_.default, _ATEN._amp_foreach_non_finite_check_and_unscale_.default)


class _Event:
    """Stands in for torch.cuda.Event: a mark among the GPU's work."""

    def __init__(self, **_: object) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return False


class _Named(TorchDispatchMode):
    """Sees every call: those for the CPU are made as ever, those for the GPU go to FakeTensorMode."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        given = [value for value in tree_leaves((args, options)) if isinstance(value, Tensor)]
        device = torch.device(options.get("device") or "cpu").type
        if device != "cuda" and not any(tensor.is_cuda for tensor in given):
            with _disable_current_modes():  # type: ignore[no-untyped-call]
                return call(*args, **options | ({"pin_memory": False} if "pin_memory" in options else {}))
        if _is_waited_for(call, args, options):
            self._note(call)
        if call is _ATEN.copy_.default and not args[0].is_cuda:
            return args[0]
        if call in _IN_PLACE:
            assert all(tensor.is_cuda for tensor in given), f"{call} was given tensors of the CPU too"
            return None
        return call(*args, **options)

    def _note(self, call: Any) -> None:
        lines = [f for f in traceback.extract_stack() if f.filename.startswith(_TRAINER)]
        self._waits.append(f"{call} at {lines[-1].filename}:{lines[-1].lineno}" if lines else str(call))


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
    """Inside, torch.device("cuda") can be named. Yields what would have waited for it, as it happens."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 40, 1 << 40))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    with FakeTensorMode(allow_non_fake_inputs=True), _Named(waits):
        yield waits
