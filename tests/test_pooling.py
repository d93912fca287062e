"""The same numbers and gradients as PyTorch's own max pooling."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from trainer import pooling

LAST, FIRST = torch.channels_last, torch.contiguous_format


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what was compared here and not by PyTorch."""
    seen: list[tuple[int, ...]] = []
    pairs = pooling._pairs
    monkeypatch.setattr(
        pooling, "_pairs", lambda pixels, axis: (seen.append(tuple(pixels.shape)), pairs(pixels, axis))[1]
    )
    return seen


def pools(plain: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    plain = plain or nn.MaxPool2d(2, 2)
    quick = copy.deepcopy(plain)
    pooling.compare_pictures(quick)
    return plain, quick


def images(*shape: int, dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAST) -> Tensor:
    """Of few values, so that many are equal."""
    torch.manual_seed(0)
    return torch.randint(-3, 4, shape).to(dtype).to(memory_format=layout)


def both(pool: nn.Module, given: Tensor, layout: torch.memory_format = LAST) -> tuple[Tensor, Tensor]:
    given = given.clone().requires_grad_()
    pooled = pool(given)
    wanted = torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype).view(pooled.shape)
    pooled.backward(wanted.to(memory_format=layout))
    assert given.grad is not None
    return pooled.detach(), given.grad


@pytest.mark.parametrize(
    ("channels", "dtype"), list(itertools.product((1, 3, 7, 8, 32), (torch.float32, torch.bfloat16)))
)
def test_the_same_numbers(compared: list[tuple[int, ...]], channels: int, dtype: torch.dtype) -> None:
    plain, quick = pools()
    given = images(5, channels, 8, 6, dtype=dtype)
    for own, wanted in zip(both(quick, given), both(plain, given), strict=True):
        assert own.dtype == wanted.dtype and torch.equal(own, wanted) and own.is_contiguous(memory_format=LAST)
    assert bool(compared) == (dtype == torch.bfloat16 and channels < 8)  # else PyTorch's own learns as fast
    with torch.no_grad():
        assert torch.equal(quick(given), plain(given))
    assert (5, 8, 6, channels) in compared


@pytest.mark.parametrize(
    "given",
    [
        images(2, 33, 4, 4), images(2, 6, 5, 4), images(2, 6, 4, 5), images(0, 6, 4, 4),
        images(2, 6, 4, 4, layout=FIRST), images(2, 6, 4, 4, dtype=torch.float64), images(6, 4, 4, layout=FIRST),
    ],
    ids=["many channels", "odd height", "odd width", "none", "channel by channel", "float64", "one picture"],
)  # fmt: skip
def test_other_images_are_pytorchs(compared: list[tuple[int, ...]], given: Tensor) -> None:
    plain, quick = pools()
    with torch.no_grad():
        assert torch.equal(quick(given), plain(given))
    assert not compared


class Doubled(nn.MaxPool2d):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


@pytest.mark.parametrize(
    "plain",
    [
        nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 2, 1), nn.MaxPool2d(2, 2, dilation=2),
        nn.MaxPool2d((2, 1)), nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(2, ceil_mode=True), Doubled(2),
    ],
    ids=str,
)  # fmt: skip
def test_other_poolings_are_pytorchs(compared: list[tuple[int, ...]], plain: nn.MaxPool2d) -> None:
    plain, quick = pools(plain)
    given = images(2, 6, 8, 8)
    with torch.no_grad():
        own, wanted = quick(given), plain(given)
    assert all(map(torch.equal, own, wanted))
    assert not compared


def test_a_gradient_that_lies_channel_by_channel(compared: list[tuple[int, ...]]) -> None:
    plain, quick = pools()
    given = images(5, 6, 8, 6, dtype=torch.bfloat16)
    assert all(map(torch.equal, both(quick, given, FIRST), both(plain, given, FIRST)))
    assert compared


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")  # what TensorBoard's graph is made by
def test_a_trace_says_max_pooling(compared: list[tuple[int, ...]]) -> None:
    _, quick = pools(nn.Sequential(nn.MaxPool2d(2)))
    with torch.no_grad():
        traced = torch.jit.trace(quick, images(2, 6, 4, 4), check_trace=False)  # type: ignore[no-untyped-call]
    assert "aten::max_pool2d" in str(traced.inlined_graph) and not compared


def test_a_copy_and_another_way_to_say_two_by_two(compared: list[tuple[int, ...]]) -> None:
    _, quick = pools(nn.Sequential(nn.MaxPool2d((2, 2), stride=(2, 2), padding=(0, 0))))
    with torch.no_grad():
        copy.deepcopy(quick)(images(2, 6, 4, 4))
    assert compared
