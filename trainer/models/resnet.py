"""ResNet-18 for small images: torchvision's, with the stem that CIFAR-10 wants. (He et al., arXiv 1512.03385.)"""

from torch import nn

from trainer.config.schema import ModelSettings


def resnet18(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """The first layer is 3x3 at stride 1 and nothing is pooled after it, so that 32 pixels reach stage one whole."""
    from torchvision.models import resnet18 as build  # late: 2 s

    net: nn.Module = build(num_classes=num_classes)
    net.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net
