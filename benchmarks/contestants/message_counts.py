"""A training whose collectives are counted, by step and size; rank 0 writes them down."""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch.distributed as dist
from torch import Tensor

from trainer import loop, main

path, *arguments = sys.argv[1:]
calls: list[tuple[int, str, int]] = []
current = {"step": -1}
all_reduce, batch = dist.all_reduce, dist.batch_isend_irecv
take_step = loop.Trainer._take_step


def counted_all_reduce(tensor: Tensor, *arguments: Any, **more: Any) -> Any:
    calls.append((current["step"], "all-reduce", tensor.nbytes))
    return all_reduce(tensor, *arguments, **more)


def counted_batch(operations: list[Any]) -> Any:
    calls.extend(
        (current["step"], "sent", operation.tensor.nbytes) for operation in operations if operation.op is dist.isend
    )
    return batch(operations)


def one_step(trainer: loop.Trainer, batch: Any) -> None:
    current["step"] = trainer.progress.step
    current["weights"] = sum(weight.nbytes for weight in trainer.components.module.parameters() if weight.requires_grad)
    take_step(trainer, batch)


dist.all_reduce, dist.batch_isend_irecv = counted_all_reduce, counted_batch  # type: ignore[assignment]
loop.Trainer._take_step = one_step  # type: ignore[assignment, method-assign]
code = main.main(arguments)
if os.environ["RANK"] == "0":
    Path(path).write_text(json.dumps({"calls": calls, "gradient_bytes": current["weights"]}))
sys.exit(code)
