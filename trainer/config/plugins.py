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
# torchvision's classifiers, for hints; any that the installed version has can be used as torchvision/NAME.
TORCHVISION_NAMES = (
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny", "densenet121", "densenet161",
    "densenet169", "densenet201", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3",
    "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l",
    "efficientnet_v2_m", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mnasnet0_75",
    "mnasnet1_0", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_16gf",
    "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf", "regnet_x_8gf",
    "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf", "regnet_y_400mf",
    "regnet_y_800mf", "regnet_y_8gf", "resnet101", "resnet152", "resnet18", "resnet34", "resnet50",
    "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_0", "squeezenet1_1", "swin_b", "swin_s", "swin_t",
    "swin_v2_b", "swin_v2_s", "swin_v2_t", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19",
    "vgg19_bn", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2", "wide_resnet50_2",
)  # fmt: skip
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
