"""Runs trainer/main.py with the network of tiny.py; in the first attempt rank 1 is killed in the middle of an epoch."""

import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).resolve().parents[2])]

import torch

from trainer import main
from trainer.config.plugins import MODELS
from trainer.data.loader import Samples
from trainer.step import Step

prepare_images = Step._prepare_images
calls: list[int] = []


def prepare_images_or_die(self: Step, index: int, samples: Samples) -> torch.Tensor:
    calls.append(1)
    if len(calls) == 33 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare_images(self, index, samples)


MODELS["lenet"] = "support.workers.tiny:tiny"
Step._prepare_images = prepare_images_or_die  # type: ignore[method-assign]
sys.exit(main.main())
