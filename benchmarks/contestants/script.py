"""The tutorials' own script: a data set of PIL images, torchvision's transforms one image at a time, a DataLoader."""

import common
import torch
from torch import nn

settings = common.given()
turn = common.Turn()
net = common.network(settings)
trainloader = common.loader(settings)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(
    net.parameters(), lr=common.LR, momentum=common.MOMENTUM, weight_decay=common.WEIGHT_DECAY
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
