"""What an evaluation of the test set has to show beyond two numbers, for the trackers."""

import torch
from torch import Tensor, nn

from trainer.tracking.tracker import Histogram

_BINS = 64
_MOST_VALUES = 1 << 20


def histograms(module: nn.Module) -> dict[str, Histogram]:
    """`weights/NAME` of every parameter, and `gradients/NAME` of those that have one now."""
    found = {}
    for name, parameter in module.named_parameters():
        for kind, values in (("weights", parameter.detach()), ("gradients", parameter.grad)):
            if values is not None:
                found[f"{kind}/{name}"] = _histogram(values)
    return {name: histogram for name, histogram in found.items() if histogram is not None}


def _histogram(values: Tensor) -> Histogram | None:
    values = values.flatten()[:: max(1, values.numel() // _MOST_VALUES)].float().cpu()
    values = values[values.isfinite()]
    if not values.numel():
        return None
    least, most = (float(value) for value in values.aminmax())
    if least == most:
        least, most = least - 0.5, most + 0.5
    counts = torch.histc(values, _BINS, least, most).tolist()
    edges = torch.linspace(least, most, _BINS + 1, dtype=torch.float64).tolist()
    return Histogram(counts, edges, float(values.double().sum()), float(values.double().square().sum()))
