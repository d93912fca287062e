"""Trains without data work: a bare loop over augmented and normalized batches in the network's memory format.

With "ranks" in its settings it uses DistributedDataParallel, and each rank has its part of the batch.
"""

import harness
import torch
import torch.nn.functional as F
from torch import nn

_NUM_BATCHES = 16

settings = harness.read_settings()
torch.backends.cudnn.benchmark = True
ranks, is_rank0, device = settings.get("ranks", 1), harness.start_ranks(settings), settings["device"]
turn = harness.make_turn(settings) if is_rank0 else None
network = harness.make_network(settings)
memory_format = torch.channels_last if settings.get("channels_last", True) else torch.contiguous_format
network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
if ranks > 1:
    torch.distributed.init_process_group("gloo")
    network = nn.parallel.DistributedDataParallel(network)
optimizer = torch.optim.SGD(
    network.parameters(), harness.LR, harness.MOMENTUM, weight_decay=harness.WEIGHT_DECAY,
    fused=settings.get("fused", True),
)  # fmt: skip
rank_batch_size = settings["batch_size"] // ranks
num_images = _NUM_BATCHES * rank_batch_size
all_images = torch.randn(num_images, 3, 32, 32).to(device, memory_format=memory_format)
all_labels = torch.randint(10, (num_images,), device=device)
batches = list(zip(all_images.split(rank_batch_size), all_labels.split(rank_batch_size), strict=True))

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
