"""The bare loop that holds the data set as uint8 and normalizes each batch: what a training must keep in memory."""

import given
import torch
import torch.nn.functional as F

settings = given.settings()
images, labels = given.arrays(settings, shuffled=False)
pixels, targets = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
net = given.network(settings).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(net.parameters(), given.LR, given.MOMENTUM, weight_decay=given.WEIGHT_DECAY, fused=True)
mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (given.MEAN, given.STD))
for step in range(settings["steps"]):
    at = slice(step * settings["batch_size"], (step + 1) * settings["batch_size"])
    loss = F.cross_entropy(net((pixels[at] / 255 - mean) / std), targets[at])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
