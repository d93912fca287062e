"""The optimizers are the named ones."""

import torch
from torch import nn

from trainer import optim
from trainer.settings import Optim


def test_optimizers_are_built_as_set() -> None:
    settings = Optim(lr=0.5, momentum=0.8, nesterov=True, weight_decay=0.1, betas=[0.7, 0.9])
    sgd = optim.OPTIMIZERS["sgd"]([nn.Parameter(torch.zeros(1))], settings).param_groups[0]
    assert (sgd["lr"], sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.5, 0.8, True, 0.1)
    adamw = optim.OPTIMIZERS["adamw"]([nn.Parameter(torch.zeros(1))], settings).param_groups[0]
    assert (adamw["lr"], adamw["betas"], adamw["weight_decay"]) == (0.5, (0.7, 0.9), 0.1)
