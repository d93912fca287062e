"""Lightning as its documentation teaches it, with nothing on that costs: no logger, no progress bar, no checkpoints."""

import logging
import warnings

import given
import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


class Classifier(lightning.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=given.LR, momentum=given.MOMENTUM, weight_decay=given.WEIGHT_DECAY)


class Turns(lightning.Callback):
    def __init__(self) -> None:
        self._turn = given.Turn()

    def on_train_start(self, trainer: object, pl_module: object) -> None:
        self._turn.begin()

    def on_train_batch_end(self, *arguments: object) -> None:
        self._turn()


settings = given.settings()
trainer = lightning.Trainer(
    accelerator="cpu", devices=1, max_epochs=-1, precision="bf16-mixed" if settings["precision"] == "bf16" else 32,
    logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    callbacks=[Turns()],
)  # fmt: skip
trainer.fit(Classifier(given.network(settings)), given.loader(settings))
