"""samecurve's own Trainer, as `python trainer/main.py` runs it, with a turn after each step.

With "ranks" in its settings the others do their part of each of its steps.
"""

import sys
import tempfile

import given

from trainer import loop
from trainer.config.load import find_config_file, load_config
from trainer.distributed.world import World
from trainer.run.stop import StopSignals

settings = given.settings()
is_first = given.start_ranks(settings)
turn = given.turns(settings) if is_first else None
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
    config = load_config(
        [find_config_file(name) for name in settings.get("configs", [])],
        [
            "data.name=image_folder", f"data.root={settings['images']}", *given.cache(settings),
            "data.augment=[flip,crop]", "data.normalize=cifar10", f"data.global_batch_size={settings['batch_size']}",
            "data.drop_last=true",
            f"model.name={settings['model']}", f"optim.lr={given.LR}", f"optim.weight_decay={given.WEIGHT_DECAY}",
            f"train.device={settings['device']}", f"train.precision={settings['precision']}",
            f"train.threads_per_rank={settings['threads']}", "train.epochs=10000", "checkpoint.every_epochs=0",
            "eval.every_epochs=0", "schedule.name=constant", "log.tensorboard=false", "log.wandb=off",
            f"run.root={root}", "run.name=run", *settings.get("overrides", []),
        ],
    )  # fmt: skip
    with World(config.train) as world:
        loop.train(config, world, StopSignals(speaks=False))
sys.exit(1)
