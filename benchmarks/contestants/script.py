"""The tutorials' own script: a data set of PIL images, torchvision's transforms one image at a time, a DataLoader."""

import given
import torch
from torch import nn

settings = given.settings()
turn = given.Turn()
net = given.network(settings)
trainloader = given.loader(settings)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(
    net.parameters(), lr=given.LR, momentum=given.MOMENTUM, weight_decay=given.WEIGHT_DECAY
)  # fmt: skip

turn.begin()
while True:
    running_loss = 0.0
    for inputs, labels in trainloader:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bf16"):
            outputs = net(inputs)
            loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        turn()
