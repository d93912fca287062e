"""Trains with samecurve's Trainer, as `python trainer/main.py` does, and takes turns after its steps.

With "ranks" in its settings, the other ranks share each step.
"""

import sys
import tempfile

import harness

from trainer import loop, session
from trainer.config.load import find_config_file, load_config
from trainer.distributed.world import World
from trainer.run.stop import StopSignals

settings = harness.read_settings()
is_rank0 = harness.start_ranks(settings)
turn = harness.make_turn(settings) if is_rank0 else None
take_step = loop.Trainer._take_step  # private: a public hook would be work in every step of every run
has_begun = False


def take_step_in_turn(trainer: loop.Trainer, batch: object) -> None:
    global has_begun
    if turn is not None and not has_begun:
        turn.begin()
        has_begun = True
    take_step(trainer, batch)  # type: ignore[arg-type]
    if turn is not None:
        turn()


if __name__ == "__main__":  # a data worker process may import this file again
    loop.Trainer._take_step = take_step_in_turn  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory(prefix="samecurve-speed-") as root:
        config = load_config(
            [find_config_file(name) for name in settings.get("configs", [])],
            [
                *harness.data_overrides(settings), "data.augment=[flip,crop]", "data.normalize=cifar10",
                f"data.global_batch_size={settings['batch_size']}", "data.drop_last=true",
                f"model.name={settings['model']}", f"optim.lr={harness.LR}",
                f"optim.weight_decay={harness.WEIGHT_DECAY}",
                f"train.device={settings['device']}", f"train.precision={settings['precision']}",
                f"train.threads_per_rank={settings['threads']}", "train.epochs=10000", "checkpoint.every_epochs=0",
                "eval.every_epochs=0", "schedule.name=constant", "log.tensorboard=false", "log.wandb=off",
                f"run.root={root}", "run.name=run", *settings.get("overrides", []),
            ],
        )  # fmt: skip
        with World(config.train) as world:
            session.train(config, world, StopSignals(is_reporter=False))
    sys.exit(1)  # the training must not end before the race
