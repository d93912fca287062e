"""Lists the built-in data sets, networks, losses, optimizers and schedules by name. Imports no torch.

An entry is `package.module:function`, or `package.module` for a data set. A run imports only the entries that it uses.
To add one, write it in a file of its folder and add a line here. The settings, --help and the error messages then list
it.
"""

import importlib
from collections.abc import Mapping
from typing import Any

MODELS = {
    "lenet": "trainer.models.small:lenet",
    "tudui": "trainer.models.small:tudui",
    "speedrun": "trainer.models.speedrun:speedrun",
    "resnet18": "trainer.models.resnet:resnet18",
    "vgg16": "trainer.models.torchvision:vgg16",
}
DATASETS = {
    "cifar10": "trainer.data.cifar10",
    "image_folder": "trainer.data.image_folder",
    "digits": "trainer.data.digits",
}
LOSSES = {
    "cross_entropy": "trainer.optim.losses:cross_entropy",
    "mse": "trainer.optim.losses:mse",
    "l1": "trainer.optim.losses:l1",
}
OPTIMIZERS = {
    "sgd": "trainer.optim.optimizers:sgd",
    "adamw": "trainer.optim.optimizers:adamw",
    "muon": "trainer.optim.optimizers:muon",
}
SCHEDULES = {
    "constant": "trainer.optim.schedule:constant",
    "cosine": "trainer.optim.schedule:cosine",
    "linear": "trainer.optim.schedule:linear",
}


def load_plugin(table: Mapping[str, str], name: str) -> Any:
    """Imports the entry `name` of a table above and returns its function, or its module if it names no function."""
    module_name, _, attribute = table[name].partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module
