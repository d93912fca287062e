"""Trains as Accelerate's cv_example.py does: all objects prepared, a scheduler step for each optimizer step."""

import harness
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import OneCycleLR

settings = harness.read_settings()
turn = harness.make_turn(settings)
accelerator = Accelerator(cpu=True, mixed_precision="bf16" if settings["precision"] == "bf16" else "no")
torch.set_num_threads(settings["threads"])
model, train_dataloader = harness.make_network(settings), harness.make_loader(settings)
optimizer = torch.optim.SGD(
    params=model.parameters(), lr=harness.LR / 25, momentum=harness.MOMENTUM, weight_decay=harness.WEIGHT_DECAY
)
lr_scheduler = OneCycleLR(optimizer=optimizer, max_lr=harness.LR, epochs=1000, steps_per_epoch=len(train_dataloader))
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
