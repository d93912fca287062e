"""The same gradients as PyTorch's own convolution, however many pictures lie side by side."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from trainer import convolutions


@pytest.fixture(autouse=True)
def small_networks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "_FEWEST_CHANNELS", 4)


def gradients(network: nn.Module, images: Tensor) -> list[Tensor]:
    images = images.clone().requires_grad_()
    network.zero_grad()
    out = network(images)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), images.grad, *(weight.grad for weight in network.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize(("batch_size", "kernel"), list(itertools.product((1, 6, 7, 64, 80), (3, 5, (3, 1), (1, 3)))))
def test_gradients_are_the_same(batch_size: int, kernel: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    plain = nn.Conv2d(4, 6, kernel, padding=(rows // 2, columns // 2), bias=batch_size % 2 == 0).double()
    quick = copy.deepcopy(plain)
    convolutions.lay_side_by_side(quick)
    images = torch.randn(batch_size, 4, 5, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    for own, wanted in zip(gradients(quick, images), gradients(plain, images), strict=True):
        assert torch.allclose(own, wanted, rtol=1e-12, atol=1e-12)


def test_it_is_done_where_pictures_are_small_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    strips = convolutions._strips
    monkeypatch.setattr(convolutions, "_strips", lambda *given: (seen.append(given[0].shape), strips(*given))[1])
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1),
        nn.Conv2d(3, 5, 3),
        nn.Conv2d(5, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.Conv2d(6, 6, 1),
    )  # fmt: skip
    convolutions.lay_side_by_side(network)
    gradients(network, torch.randn(8, 3, 16, 16))
    assert seen == [(8, 5, 8, 8), (8, 4, 8, 8)]  # gradient and images of the second
    with torch.no_grad():
        network(torch.randn(8, 3, 16, 16))
    assert len(seen) == 2


def test_other_inputs_and_other_convolutions_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Conv2d):
        def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return 2 * super()._conv_forward(images, weight, bias)

    own, plain = Own(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    own.load_state_dict(plain.state_dict())
    for network in (own, plain):
        convolutions.lay_side_by_side(network)
    images = torch.randn(8, 4, 5, 5)
    assert torch.equal(own(images), 2 * plain(images))
    for images in (torch.randn(4, 5, 5), torch.randn(0, 4, 5, 5)):  # one picture; none
        assert gradients(plain, images)[0].shape == images.shape


def test_as_precise_as_pytorchs_own_under_autocast() -> None:
    torch.manual_seed(0)
    exact = nn.Conv2d(16, 16, 3, padding=1).double()
    images = torch.randn(32, 16, 4, 4)
    wanted = gradients(exact, images.double())
    plain = copy.deepcopy(exact).float()
    quick = copy.deepcopy(plain)
    convolutions.lay_side_by_side(quick)
    with torch.autocast("cpu", torch.bfloat16):
        found = [gradients(network, images) for network in (quick, plain)]
    for own, pytorchs, right in zip(*found, wanted, strict=True):
        assert own.dtype == pytorchs.dtype
        assert (own - right).norm() < 1.1 * (pytorchs - right).norm() + 1e-3 * right.norm()
