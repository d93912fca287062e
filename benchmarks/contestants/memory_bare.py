"""Trains with a bare loop over uint8 images in memory that normalizes each batch: the least memory of a training."""

import harness
import torch
import torch.nn.functional as F

settings = harness.read_settings()
images, labels = harness.load_images(settings, shuffle=False)  # shuffling would copy them
pixels, targets = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
network = harness.make_network(settings).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(
    network.parameters(), harness.LR, harness.MOMENTUM, weight_decay=harness.WEIGHT_DECAY, fused=True
)
mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (harness.MEAN, harness.STD))
for step in range(settings["steps"]):
    batch = slice(step * settings["batch_size"], (step + 1) * settings["batch_size"])
    loss = F.cross_entropy(network((pixels[batch] / 255 - mean) / std), targets[batch])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
