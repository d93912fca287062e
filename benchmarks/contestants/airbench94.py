"""Trains airbench94 on a CPU: its author's network, loader, optimizer, schedules and loop, bf16 by autocast.

Differences from the airbench package: no CUDA, images from this benchmark's folder, floats instead of halves.
With a path "result" in its settings it trains to the end, without turns, and writes its seconds and accuracy there.
"""

import json
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from time import perf_counter

import harness
import torch
import torchvision.transforms as T
from airbench import lib_airbench94 as lib
from airbench import utils
from torch import Tensor, nn


class Loader(utils.CifarLoader):  # type: ignore[misc]
    """airbench's loader on arrays instead of its own files."""

    def __init__(self, images: Tensor, labels: Tensor, train: bool, batch_size: int, aug: dict[str, object]) -> None:
        self.epoch = 0
        self.images = (images.float() / 255).permute(0, 3, 1, 2).to(memory_format=torch.channels_last)
        self.labels = labels
        self.normalize = T.Normalize(utils.CIFAR_MEAN, utils.CIFAR_STD)
        self.proc_images: dict[str, Tensor] = {}
        self.aug = aug
        self.batch_size, self.drop_last, self.shuffle, self.altflip = batch_size, train, train, train


def make_net() -> nn.Sequential:
    widths, momentum = lib.hyp["net"]["widths"], lib.hyp["net"]["batchnorm_momentum"]
    net = nn.Sequential(
        lib.Conv(3, 24, 2, padding=0, bias=True),
        nn.GELU(),
        lib.ConvGroup(24, widths["block1"], momentum),
        lib.ConvGroup(widths["block1"], widths["block2"], momentum),
        lib.ConvGroup(widths["block2"], widths["block3"], momentum),
        nn.MaxPool2d(3),
        lib.Flatten(),
        nn.Linear(widths["block3"], 10, bias=False),
        lib.Mul(lib.hyp["net"]["scaling_factor"]),
    )
    net[0].weight.requires_grad = False
    return net.to(memory_format=torch.channels_last)


def lr_schedule(steps: int) -> Tensor:
    """Returns a factor for each step: from 0.2 up to 1 over the first 23 % of the steps, then down to 0.07."""
    peak = int(0.23 * steps)
    return torch.cat([torch.linspace(0.2, 1, peak + 1), torch.linspace(1, 0.07, steps - peak + 1)[1:]])


def train(loader: Loader, net: nn.Sequential, epochs: float, is_bf16: bool) -> Iterator[None]:
    """Runs airbench94's loop; yields after each step."""
    opt = lib.hyp["opt"]
    momentum, batch_size = opt["momentum"], loader.batch_size
    kilostep_scale = 1024 * (1 + 1 / (1 - momentum))
    lr, wd = opt["lr"] / kilostep_scale, opt["weight_decay"] * batch_size / kilostep_scale
    lr_biases = lr * opt["bias_scaler"]
    loss_fn = nn.CrossEntropyLoss(label_smoothing=opt["label_smoothing"], reduction="none")
    total_train_steps = ceil(len(loader) * epochs)
    current_steps = 0
    norm_biases = [p for k, p in net.named_parameters() if "norm" in k and p.requires_grad]
    other_params = [p for k, p in net.named_parameters() if "norm" not in k and p.requires_grad]
    param_configs = [
        {"params": norm_biases, "lr": lr_biases, "weight_decay": wd / lr_biases},
        {"params": other_params, "lr": lr, "weight_decay": wd / lr},
    ]
    optimizer = torch.optim.SGD(param_configs, momentum=momentum, nesterov=True)
    schedule = lr_schedule(total_train_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: float(schedule[i]))
    alpha_schedule = 0.95**5 * (torch.arange(total_train_steps + 1) / total_train_steps) ** 3
    lookahead_state = utils.LookaheadState(net)
    utils.init_whitening_conv(net[0], loader.normalize(loader.images[:5000]))
    for epoch in range(ceil(epochs)):
        net[0].bias.requires_grad = epoch < opt["whiten_bias_epochs"]
        net.train()
        for inputs, labels in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                loss = loss_fn(net(inputs), labels).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            current_steps += 1
            if current_steps % 5 == 0:
                lookahead_state.update(net, decay=alpha_schedule[current_steps].item())
            if current_steps >= total_train_steps:
                lookahead_state.update(net, decay=1.0)
                return
            yield


settings = harness.read_settings()
epochs, is_bf16, result_path = settings["epochs"], settings["precision"] == "bf16", settings.get("result")
turn = None if result_path else harness.make_turn(settings)
images, labels = harness.load_images(settings)
augmentations: dict[str, object] = {"flip": True, "translate": 2}
loader = Loader(torch.from_numpy(images), torch.from_numpy(labels), True, settings["batch_size"], augmentations)
net = make_net()
if turn is not None:
    turn.begin()
start = perf_counter()
for _ in train(loader, net, epochs, is_bf16):
    if turn is not None:
        turn()
seconds = perf_counter() - start
if result_path:
    images, labels = harness.load_images(settings, "test")
    test_loader = Loader(torch.from_numpy(images), torch.from_numpy(labels), False, 2000, {})
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        accuracies = {
            name: utils.evaluate(net, test_loader, tta_level)
            for name, tta_level in (("accuracy", 0), ("tta_accuracy", 2))
        }
    Path(result_path).write_text(json.dumps({"seconds": seconds} | accuracies))
