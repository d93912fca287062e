"""Reads a contestant's settings and makes its images, data loader, network and ranks."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from torch import nn
from turns import Turn

from trainer.config.schema import ModelSettings
from trainer.models.lookup import build_model

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
_PR_SET_PDEATHSIG = 1  # prctl.h


def read_settings() -> dict[str, Any]:
    """Returns the settings on the command line, and sets PyTorch's number of threads and seed.

    Keys: model, batch_size, precision (fp32 or bf16), threads, images (a folder), cache (a folder or None), workers (of
    a DataLoader), device (default: cpu), ranks (default: 1), port, seed (default: 0).
    """
    settings: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    settings.setdefault("device", "cpu")
    torch.manual_seed(settings.get("seed", 0))
    return settings


def start_ranks(settings: dict[str, Any]) -> bool:
    """Starts settings["ranks"] - 1 more processes with torchrun's environment variables. Returns whether this is
    rank 0. The other ranks end when rank 0 ends.
    """
    ranks = settings.get("ranks", 1)
    if ranks == 1:
        return True
    if "RANK" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return False
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(settings["port"]), "RANK": "0", "LOCAL_RANK": "0"}
    for rank in range(1, ranks):
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    return True


def load_images(settings: dict[str, Any], split: str = "train", shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images of a split, uint8 [N, 32, 32, 3], and labels, int64 [N]; sorted by class if not shuffled."""
    from trainer.config.load import load_config
    from trainer.data import image_folder

    dataset = image_folder.load(load_config([], data_overrides(settings)).data)
    images, labels = getattr(dataset, split).images, getattr(dataset, split).labels
    if not shuffle:
        return images, labels
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order], labels[order]


def data_overrides(settings: dict[str, Any]) -> list[str]:
    """Returns the section.key=value words with which samecurve reads the images."""
    cache = [f"data.cache_dir={settings['cache']}"] if settings.get("cache") else []
    return ["data.name=image_folder", f"data.root={settings['images']}", *cache]


class PilImages(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """CIFAR-10 as torchvision's class provides it: each image becomes a PIL image and is then transformed."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        from torchvision import transforms

        self._images, self._labels = images, labels.tolist()
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


def make_loader(settings: dict[str, Any]) -> "torch.utils.data.DataLoader[Any]":
    """Returns a DataLoader as in PyTorch's tutorials, with settings["workers"] worker processes."""
    workers = settings["workers"]
    return torch.utils.data.DataLoader(
        PilImages(*load_images(settings)), settings["batch_size"], shuffle=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip


def make_turn(settings: dict[str, Any]) -> Turn:
    """Returns a Turn that waits for the GPU if the settings use one."""
    return Turn(torch.cuda.synchronize) if settings["device"] == "cuda" else Turn()


def make_network(settings: dict[str, Any]) -> nn.Module:
    """Returns settings["model"] for 10 classes and images of 3 x 32 x 32 pixels."""
    return build_model(ModelSettings(name=settings["model"]), 10, 3, 32)
