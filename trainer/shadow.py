"""A network in, another one that shares its numbers out: to be looked at while the first one is trained."""

import copy
from itertools import chain
from typing import Any

from torch import nn


def shadow(network: nn.Module) -> nn.Module:
    """In evaluation mode, in full precision, not compiled, without gradients; takes no memory worth speaking of."""
    memo: dict[int, Any] = {}
    for tensor in chain(network.parameters(), network.buffers()):
        shared = tensor.detach()
        memo[id(tensor)] = nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared
    made = copy.deepcopy(network, memo)
    for name in ("forward", "_original_forward"):  # accelerate's, for other precisions
        made.__dict__.pop(name, None)
    return made.eval()
