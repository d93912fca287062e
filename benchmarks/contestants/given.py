"""What all contestants share: the images, the network, the settings that they were given."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import numpy as np
import torch
from PIL import Image
from torch import nn
from turns import Turn

from trainer.config.schema import ModelSettings
from trainer.models.lookup import build_model

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_PR_SET_PDEATHSIG = 1  # prctl.h
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4

__all__ = [
    "LR", "MEAN", "MOMENTUM", "STD", "WEIGHT_DECAY", "Turn", "arrays", "loader", "network", "settings",
    "start_ranks", "turns",
]  # fmt: skip


def settings() -> dict[str, Any]:
    """model, batch_size, precision, threads, images (a folder), workers, seed. Sets the threads and the seed."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(found["threads"])
    found.setdefault("device", "cpu")
    torch.manual_seed(found.get("seed", 0))
    return found


def start_ranks(settings: dict[str, Any]) -> bool:
    """Starts settings["ranks"] - 1 processes more, with the environment that torchrun would make, and tells whether
    this one is the first; the others end with it."""
    ranks = settings.get("ranks", 1)
    if ranks == 1:
        return True
    if "RANK" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return False
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= size | {"MASTER_PORT": str(settings["port"]), "RANK": "0", "LOCAL_RANK": "0"}
    for rank in range(1, ranks):
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    return True


def arrays(settings: dict[str, Any], split: str = "train", shuffled: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The images of a split, uint8 [N, 32, 32, 3], and labels, int64 [N], in no order of classes if shuffled."""
    from trainer.config.load import load_config
    from trainer.data import image_folder

    data = load_config([], ["data.name=image_folder", f"data.root={settings['images']}", *cache(settings)]).data
    found = getattr(image_folder.load(data), split)
    if not shuffled:
        return found.images, found.labels
    order = np.random.default_rng(0).permutation(len(found.labels))
    return found.images[order], found.labels[order]


def cache(settings: dict[str, Any]) -> list[str]:
    """Where decoded images are kept, if not beside the images."""
    return [f"data.cache_dir={settings['cache']}"] if settings.get("cache") else []


class PilImages(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """As torchvision's CIFAR10 has them: an array in memory, each image made a PIL one, then transformed."""

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


def loader(settings: dict[str, Any]) -> "torch.utils.data.DataLoader[Any]":
    """The DataLoader of the tutorials, with so many workers."""
    workers = settings["workers"]
    return torch.utils.data.DataLoader(
        PilImages(*arrays(settings)), settings["batch_size"], shuffle=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip


def turns(settings: dict[str, Any]) -> Turn:
    return Turn(torch.cuda.synchronize) if settings["device"] == "cuda" else Turn()


def network(settings: dict[str, Any]) -> nn.Module:
    return build_model(ModelSettings(name=settings["model"]), 10, 3, 32)
