"""Takes one step with Lightning (LeNet on the digits, one DataLoader) and prints a line when the step is done."""

import harness  # noqa: F401 (makes trainer importable)
import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from trainer.config.schema import DataSettings
from trainer.data import digits
from trainer.models.small import LeNet


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = LeNet(10, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class PrintStep(lightning.Callback):
    def on_train_batch_end(self, *arguments: object) -> None:
        print("step 1/", flush=True)


# samecurve's loader is faster than scikit-learn's: Lightning is not charged for the difference.
split = digits.load(DataSettings(name="digits")).train
images = torch.from_numpy(split.images).permute(0, 3, 1, 2) / 255
trainer = lightning.Trainer(
    accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
    enable_model_summary=False, callbacks=[PrintStep()],
)  # fmt: skip
loader = DataLoader(TensorDataset(images, torch.from_numpy(split.labels)), batch_size=64, shuffle=True)
trainer.fit(Classifier(), loader)
