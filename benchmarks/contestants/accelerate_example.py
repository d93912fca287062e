"""The shape of Accelerate's cv_example.py: all prepared, a scheduler that steps with the optimizer."""

import common
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import OneCycleLR

settings = common.given()
turn = common.Turn()
accelerator = Accelerator(cpu=True, mixed_precision="bf16" if settings["precision"] == "bf16" else "no")
torch.set_num_threads(settings["threads"])
model, train_dataloader = common.network(settings), common.loader(settings)
optimizer = torch.optim.SGD(
    params=model.parameters(), lr=common.LR / 25, momentum=common.MOMENTUM, weight_decay=common.WEIGHT_DECAY
)
lr_scheduler = OneCycleLR(optimizer=optimizer, max_lr=common.LR, epochs=1000, steps_per_epoch=len(train_dataloader))
model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(model, optimizer, train_dataloader, lr_scheduler)

turn.begin()
while True:
    model.train()
    total_loss = 0
    for inputs, labels in train_dataloader:
        outputs = model(inputs)
        loss = torch.nn.functional.cross_entropy(outputs, labels)
        total_loss += loss.detach().float()
        accelerator.backward(loss)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        turn()
