"""Trains with Lightning as its documentation shows it, without the cost of logger, progress bar and checkpoints."""

import logging
import warnings

import harness
import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


class Classifier(lightning.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), lr=harness.LR, momentum=harness.MOMENTUM, weight_decay=harness.WEIGHT_DECAY
        )


class TakeTurns(lightning.Callback):
    def __init__(self) -> None:
        self._turn = harness.make_turn(settings)

    def on_train_start(self, trainer: object, pl_module: object) -> None:
        self._turn.begin()

    def on_train_batch_end(self, *arguments: object) -> None:
        self._turn()


settings = harness.read_settings()
trainer = lightning.Trainer(
    accelerator="cpu", devices=1, max_epochs=-1, precision="bf16-mixed" if settings["precision"] == "bf16" else 32,
    logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    callbacks=[TakeTurns()],
)  # fmt: skip
trainer.fit(Classifier(harness.make_network(settings)), harness.make_loader(settings))
