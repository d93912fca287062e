"""A GPU in name only, for machines without one: tensors that say they lie on it and have no memory (fake tensors).

PyTorch checks what it is asked for, shapes and devices, and computes nothing: what is read from such a tensor is one
number, whatever it is. What would keep the CPU waiting for a GPU is written down: reading a value, copies that are
waited for or whose memory is not pinned, synchronizing. The driver's answers are made up. PyTorch's own backward pass
is not run, as it asks the driver for streams: its gradients are made up too, and its waits are not seen.
"""

import contextlib
import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
EVENTS_AHEAD = 8  # a GPU that has these to come still has work when the CPU waits for the one before
_TRAINER = str(Path(__file__).resolve().parents[1] / "trainer")
_ATEN = torch.ops.aten
_READ = _ATEN._local_scalar_dense.default
_COPIES = (_ATEN._to_copy.default, _ATEN.copy_.default)
_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put_.default)
# They change what they are given, and PyTorch has no stand-in for them.
_IN_PLACE = (
    _ATEN._fused_sgd_.default,
    _ATEN._fused_adamw_.default,
    _ATEN._amp_foreach_non_finite_check_and_unscale_.default,
)


@dataclass
class NamedGpu:
    waits: list[str] = field(default_factory=list)
    """what would have waited for the GPU, and where"""
    value: float = 0.0
    """what is read from it"""

    def note(self, what: object) -> None:
        lines = [line for line in traceback.extract_stack() if line.filename.startswith(_TRAINER)]
        self.waits.append(f"{what} at {Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else str(what))


class _Calls(TorchDispatchMode):
    """Sees every call: those for the CPU are made as ever, those for the GPU go to FakeTensorMode."""

    def __init__(self, gpu: NamedGpu) -> None:
        super().__init__()
        self._gpu = gpu
        self._pinned: dict[int, Tensor] = {}

    def pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        given = [value for value in tree_leaves((args, options)) if isinstance(value, Tensor)]
        device = torch.device(options.get("device") or (given[0].device if given else "cpu"))
        if device.type != "cuda" and not any(tensor.is_cuda for tensor in given):
            is_pinned = options.pop("pin_memory", False)
            found = _plainly(call, *args, **options)
            return self.pin(_plainly(found.zero_)) if is_pinned else found
        if call is _READ:
            self._gpu.note(call)
            return _plainly(self._read((), args[0].dtype).item)
        if call in _COPIES:
            target = args[0].device.type if call is _ATEN.copy_.default else device.type
            source = args[1] if call is _ATEN.copy_.default else args[0]
            if source.device.type != target:
                self._crosses(call, source if target == "cuda" else args[0], args, options)
            if target == "cpu":
                found = self._read(source.shape, options.get("dtype") or args[0].dtype)
                return found if call is not _ATEN.copy_.default else _plainly(args[0].copy_, found)
        if call in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            assert args[0].is_cuda or not any(index.is_cuda for index in indices), "a GPU's indices of a CPU's tensor"
            if any(index.device != args[0].device or index.dtype is torch.bool for index in indices):
                self._gpu.note(call)
        if call in _IN_PLACE:
            assert all(tensor.is_cuda for tensor in given), f"{call} was given tensors of the CPU too"
            return None
        return call(*args, **options)

    def _crosses(self, call: object, on_cpu: Tensor, args: Any, options: dict[str, Any]) -> None:
        """A copy is waited for unless it is asked not to be and the CPU's memory stays where it is."""
        is_pinned = not on_cpu.is_cuda and on_cpu.untyped_storage().data_ptr() in self._pinned
        if not (is_pinned and (options.get("non_blocking") or args[2:3] == (True,))):
            self._gpu.note(call)

    def _read(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _plainly(torch.full, shape, self._gpu.value, dtype=dtype)


def _plainly(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """As without a GPU."""
    with _disable_current_modes():  # type: ignore[no-untyped-call]
        return call(*args, **options)


def _event(gpu: NamedGpu) -> type:
    """torch.cuda.Event: a mark among the GPU's work."""
    marks = itertools.count()
    latest = [0]

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self) -> None:
            self._mark = latest[0] = next(marks)

        def synchronize(self) -> None:
            if latest[0] - self._mark < EVENTS_AHEAD:
                gpu.note("synchronize")

        def query(self) -> bool:
            return False

        def elapsed_time(self, last: "Event") -> float:
            return 0.0

    return Event


def _driver(gpu: NamedGpu) -> dict[str, Any]:
    class Stream:
        def synchronize(self) -> None:
            gpu.note("synchronize")

    return {
        "Event": _event(gpu),
        "current_stream": Stream,
        "synchronize": lambda device=None: gpu.note("synchronize"),
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "manual_seed_all": lambda seed: None,
        "get_device_name": lambda device=None: "a GPU in name",
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (1 << 40, 1 << 40),
        "max_memory_allocated": lambda device=None: 1 << 30,
    }


@contextlib.contextmanager
def gpu_in_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[NamedGpu]:
    """Inside, this machine has a GPU."""
    gpu = NamedGpu()
    calls = _Calls(gpu)
    for name, answer in _driver(gpu).items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: calls.pin(self.clone()))
    for caller in ("trainer.uncompiled", "torch.autograd"):
        monkeypatch.setattr(f"{caller}._engine_run_backward", _leave_gradients)
    # It would begin with a real tensor wherever there seems to be a driver.
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)
    mode = _keep_choices(monkeypatch)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False), calls:
            yield gpu
    finally:
        torch.set_deterministic_debug_mode(mode)


def _keep_choices(monkeypatch: pytest.MonkeyPatch) -> int:
    """What a run on a GPU chooses for the whole process (device.py) is not left to the tests that follow."""
    cudnn, deterministic = torch.backends.cudnn, torch.utils.deterministic
    for place, name in ((cudnn, "benchmark"), (cudnn, "allow_tf32"), (deterministic, "fill_uninitialized_memory")):
        monkeypatch.setattr(place, name, getattr(place, name))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # or a run would set it for good
    return torch.get_deterministic_debug_mode()


def _leave_gradients(results: tuple[Tensor], gradients: tuple[Tensor], *_: object, **__: object) -> None:
    """Some, of their shape, for all weights that the results came from; with the hooks that hear of it."""
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
            for hook in (weight._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
                hook(weight)
