"""The shape of Accelerate's cv_example.py: all prepared, a scheduler that steps with the optimizer."""

import given
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import OneCycleLR

settings = given.settings()
turn = given.Turn()
accelerator = Accelerator(cpu=True, mixed_precision="bf16" if settings["precision"] == "bf16" else "no")
torch.set_num_threads(settings["threads"])
model, train_dataloader = given.network(settings), given.loader(settings)
optimizer = torch.optim.SGD(
    params=model.parameters(), lr=given.LR / 25, momentum=given.MOMENTUM, weight_decay=given.WEIGHT_DECAY
)
lr_scheduler = OneCycleLR(optimizer=optimizer, max_lr=given.LR, epochs=1000, steps_per_epoch=len(train_dataloader))
model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(model, optimizer, train_dataloader, lr_scheduler)

turn.begin()
while True:
    model.train()
    total_loss = torch.zeros(())
    for inputs, labels in train_dataloader:
        outputs = model(inputs)
        loss = torch.nn.functional.cross_entropy(outputs, labels)
        total_loss += loss.detach().float()
        accelerator.backward(loss)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        turn()
