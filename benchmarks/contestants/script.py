"""Trains as PyTorch's tutorials do: PIL images, torchvision's transforms for each image, a DataLoader."""

import harness
import torch
from torch import nn

settings = harness.read_settings()
turn = harness.make_turn(settings)
network = harness.make_network(settings)
trainloader = harness.make_loader(settings)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(
    network.parameters(), lr=harness.LR, momentum=harness.MOMENTUM, weight_decay=harness.WEIGHT_DECAY
)  # fmt: skip

turn.begin()
while True:
    running_loss = 0.0
    for inputs, labels in trainloader:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bf16"):
            outputs = network(inputs)
            loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        turn()
