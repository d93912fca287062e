"""samecurve's own Trainer, as `python trainer/main.py` runs it, with a turn after each step.

With "ranks" in its settings it starts the others itself; they do their part of each of its steps.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile

import given

from trainer import config as configs
from trainer import loop
from trainer.stop import Signals
from trainer.world import World

settings = given.settings()
ranks = settings.get("ranks", 1)


def start_others() -> None:
    """The environment that torchrun would make, and the other ranks, which end with this process."""
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= size | {"MASTER_PORT": str(settings["port"]), "RANK": "0", "LOCAL_RANK": "0"}
    for rank in range(1, ranks):
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)})


if ranks > 1 and "RANK" not in os.environ:
    start_others()
elif ranks > 1:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
turn = given.turns(settings) if os.environ.get("RANK", "0") == "0" else None
take_step = loop.Trainer._take_step
begun = False


def one_step(trainer: loop.Trainer, batch: object) -> None:
    global begun
    if turn is not None and not begun:
        turn.begin()
        begun = True
    take_step(trainer, batch)  # type: ignore[arg-type]
    if turn is not None:
        turn()


loop.Trainer._take_step = one_step  # type: ignore[method-assign, assignment]
with tempfile.TemporaryDirectory(prefix="samecurve-speed-") as root:
    config = configs.load(
        [configs.find(name) for name in settings.get("configs", [])],
        [
            "data.name=image_folder", f"data.root={settings['images']}", *given.cache(settings),
            "data.augment=[flip,crop]", "data.normalize=cifar10", f"data.global_batch_size={settings['batch_size']}",
            f"model.name={settings['model']}", f"optim.lr={given.LR}", f"optim.weight_decay={given.WEIGHT_DECAY}",
            f"train.device={settings['device']}", f"train.precision={settings['precision']}",
            f"train.threads_per_rank={settings['threads']}", "train.epochs=10000", "checkpoint.every_epochs=0",
            "eval.every_epochs=0", "schedule.name=constant", "log.tensorboard=false", "log.wandb=off",
            f"run.root={root}", "run.name=run", *settings.get("overrides", []),
        ],
    )  # fmt: skip
    with World(config.train) as world:
        loop.train(config, world, Signals(speaks=False))
sys.exit(1)
