"""Trains whole runs on a GPU and measures the time, the GPU's idle share and how long a checkpoint holds up the loop.

Arguments: 1 to profile some steps or 0 to train at full speed after a warm-up run, a folder, then trainer/main.py's.
Writes measurements.json in the folder.
"""

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined] # public, but missing from its __all__
from torch.profiler import ProfilerActivity, profile

from trainer import loop, main

_PROFILED_STEPS = range(60, 80)

measurements: dict[str, Any] = {"idle_share": None, "checkpoint_stalls_ms": []}
# Private: public hooks would be work in every step of every run.
take_step, save, run = loop.Trainer._take_step, loop.Trainer.save_checkpoint, loop.Trainer.run
profiler = profile(activities=[ProfilerActivity.CUDA])
profile_start = 0.0


def busy_seconds(profiler: Any) -> float:
    """Returns how long at least one kernel ran: the union of the kernels' times."""
    times = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    busy, latest_end = 0.0, 0.0
    for start, end in times:
        busy += max(0.0, end - max(start, latest_end))
        latest_end = max(latest_end, end)
    return busy / 1e6


def take_profiled_step(trainer: loop.Trainer, batch: Any) -> None:
    global profile_start
    step = trainer.progress.step
    if step == _PROFILED_STEPS.start:
        torch.cuda.synchronize()
        profiler.start()
        profile_start = perf_counter()
    take_step(trainer, batch)
    if step == _PROFILED_STEPS.stop - 1:
        torch.cuda.synchronize()
        seconds = perf_counter() - profile_start
        profiler.stop()
        if busy := busy_seconds(profiler):  # 0 where this user has no permission to use CUPTI
            measurements["idle_share"] = round(1 - busy / seconds, 4)


def timed_save(trainer: loop.Trainer) -> None:
    torch.cuda.synchronize()
    with trainer.meter.paused():
        trainer.checkpoint_writer.wait()
    start = perf_counter()
    save(trainer)
    stall_ms = round(1e3 * (perf_counter() - start), 2)  # the first save also pins memory for the copy
    measurements["checkpoint_stalls_ms"].append(stall_ms)


def timed_run(trainer: loop.Trainer) -> str:
    start = perf_counter()
    reason = run(trainer)
    torch.cuda.synchronize()
    measurements["seconds"] = round(perf_counter() - start, 3)
    return reason


if __name__ == "__main__":  # a data worker process may import this file again
    is_profiled, folder, *arguments = sys.argv[1:]
    if is_profiled == "1":
        loop.Trainer._take_step = take_profiled_step  # type: ignore[assignment, method-assign]
    # airbench94 warms up before its clock starts, too: kernels are loaded and chosen.
    elif code := main.main([*arguments, "run.name=warm", "train.epochs=3"]):
        sys.exit(code)
    loop.Trainer.save_checkpoint = timed_save  # type: ignore[assignment, method-assign]
    loop.Trainer.run = timed_run  # type: ignore[assignment, method-assign]
    code = main.main(arguments)
    (Path(folder) / "measurements.json").write_text(json.dumps(measurements))
    sys.exit(code)
