"""A first step by Lightning: LeNet on the digits, one DataLoader, and a line when the step is done."""

import given  # noqa: F401 (finds trainer)
import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from trainer.models.small import LeNet


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = LeNet(10, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Tell(lightning.Callback):
    def on_train_batch_end(self, *arguments: object) -> None:
        print("step 1/", flush=True)


digits = load_digits()
images = F.interpolate(torch.from_numpy(digits.images).float().unsqueeze(1) / 16, (32, 32))
trainer = lightning.Trainer(
    accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
    enable_model_summary=False, callbacks=[Tell()],
)  # fmt: skip
loader = DataLoader(TensorDataset(images, torch.from_numpy(digits.target)), batch_size=64, shuffle=True)
trainer.fit(Classifier(), loader)
