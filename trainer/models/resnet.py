"""ResNet-18 for small images: torchvision's network with the stem for CIFAR-10. (He et al., arXiv 1512.03385.)"""

from torch import nn

from trainer.config.schema import ModelSettings


def resnet18(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Returns ResNet-18 without downsampling before its first stage: [B, channels, H, W] -> [B, num_classes].

    The first convolution is 3x3 with stride 1, and there is no max pooling, so that images of 32 pixels reach the first
    stage in full resolution.
    """
    from torchvision.models import resnet18 as torchvision_resnet18  # lazy import: 2 s

    network: nn.Module = torchvision_resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network
