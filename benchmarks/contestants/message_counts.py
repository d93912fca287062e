"""Trains with samecurve and counts its collectives by step and size; rank 0 writes the counts to a JSON file."""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch.distributed as dist
from torch import Tensor

from trainer import loop, main

calls: list[tuple[int, str, int]] = []
"""(step, kind, bytes) of each call; step -1 before the first step"""
current = {"step": -1, "gradient_bytes": 0}
all_reduce, batch_isend_irecv = dist.all_reduce, dist.batch_isend_irecv
take_step = loop.Trainer._take_step  # private: a public hook would be work in every step of every run


def counted_all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
    calls.append((current["step"], "all-reduce", tensor.nbytes))
    return all_reduce(tensor, *arguments, **options)


def counted_batch_isend_irecv(operations: list[Any]) -> Any:
    calls.extend(
        (current["step"], "sent", operation.tensor.nbytes) for operation in operations if operation.op is dist.isend
    )
    return batch_isend_irecv(operations)


def take_counted_step(trainer: loop.Trainer, batch: Any) -> None:
    current["step"] = trainer.progress.step
    parameters = trainer.components.module.parameters()
    current["gradient_bytes"] = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    take_step(trainer, batch)


if __name__ == "__main__":  # a data worker process may import this file again
    result_path, *arguments = sys.argv[1:]
    dist.all_reduce = counted_all_reduce
    dist.batch_isend_irecv = counted_batch_isend_irecv  # type: ignore[assignment]
    loop.Trainer._take_step = take_counted_step  # type: ignore[assignment, method-assign]
    code = main.main(arguments)
    if os.environ["RANK"] == "0":
        result = {"calls": calls, "gradient_bytes": current["gradient_bytes"]}
        Path(result_path).write_text(json.dumps(result))
    sys.exit(code)
