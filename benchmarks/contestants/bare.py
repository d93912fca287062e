"""No data work at all: the bare loop over batches that are ready, augmented and normalized, in the network's format.

With "ranks" in its settings, DistributedDataParallel over so many, each with its part of the batch.
"""

import given
import torch
import torch.nn.functional as F
from torch import nn

_BATCHES = 16

settings = given.settings()
torch.backends.cudnn.benchmark = True
ranks, is_first, device = settings.get("ranks", 1), given.start_ranks(settings), settings["device"]
turn = given.turns(settings) if is_first else None
network = given.network(settings)
channels_last = settings.get("channels_last", True)
format = torch.channels_last if channels_last else torch.contiguous_format
network.to(device, memory_format=format)  # type: ignore[call-overload]
if ranks > 1:
    torch.distributed.init_process_group("gloo")
    network = nn.parallel.DistributedDataParallel(network)
optimizer = torch.optim.SGD(
    network.parameters(), given.LR, given.MOMENTUM, weight_decay=given.WEIGHT_DECAY,
    fused=settings.get("fused", True),
)  # fmt: skip
size = settings["batch_size"] // ranks
images = torch.randn(_BATCHES * size, 3, 32, 32).to(device, memory_format=format)
batches = list(zip(images.split(size), torch.randint(10, (_BATCHES * size,), device=device).split(size), strict=True))

if turn is not None:
    turn.begin()
while True:
    for images, labels in batches:
        with torch.autocast(device, torch.bfloat16, enabled=settings["precision"] == "bf16"):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if turn is not None:
            turn()
