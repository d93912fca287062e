"""What all benchmarks share: where results go, and what they say of the machine."""

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


def parser(description: str | None, needs_images: bool = True) -> argparse.ArgumentParser:
    """With --threads (default: cores), --images, --cache and --output."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument(
        "--images", type=Path, required=needs_images, help="CIFAR-10 as image files: train/<class>/*, test/<class>/*"
    )
    made.add_argument("--cache", type=Path, help="folder for the decoded images; by default beside them")
    made.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return made


class Workload(NamedTuple):
    model: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}"

    @property
    def settings(self) -> dict[str, Any]:
        """What a contestant is told of it."""
        return self._asdict()

    def images_per_second(self, seconds_a_step: list[float]) -> float:
        return round(self.batch_size / statistics.median(seconds_a_step), 1)


def add_workloads(parser: argparse.ArgumentParser) -> None:
    """--models MODEL:BATCH_SIZE..."""

    def workload(text: str) -> Workload:
        model, _, batch_size = text.partition(":")
        return Workload(model, int(batch_size))

    wanted = [Workload("lenet", 64), Workload("tudui", 64), Workload("resnet18", 128)]
    parser.add_argument("--models", nargs="+", type=workload, default=wanted, metavar="MODEL:BATCH_SIZE")


def given(arguments: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """What a contestant is told."""
    return {
        "threads": arguments.threads, "images": str(arguments.images),
        "cache": str(arguments.cache) if arguments.cache else None,
    } | settings  # fmt: skip


def table(head: str, rows: list[str]) -> str:
    """Markdown; head and rows as 'a | b | c'."""
    lines = [head, " | ".join("---" for _ in head.split("|")), *rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def machine() -> dict[str, Any]:
    """The machine and the versions that a number was measured with."""
    import torch

    flags = _cpu_flags()
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "native_bf16": bool({"amx_bf16", "avx512_bf16", "bf16"} & flags),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(folder: Path, name: str, description: str | None, result: dict[str, Any], table: str) -> None:
    """NAME.json and NAME.md: the command's first line, the machine, the result."""
    folder.mkdir(parents=True, exist_ok=True)
    where = machine()
    command = _command()
    (folder / f"{name}.json").write_text(json.dumps({"command": command, "machine": where} | result, indent=1) + "\n")
    gpu = where["gpu"] or ("CPU with native bf16" if where["native_bf16"] else "CPU without native bf16")
    title = (description or name).partition("\n")[0]
    line = f"`{command}`\n\n{where['cores']} cores, {gpu}, Python {where['python']}, torch {where['torch']}.\n\n"
    (folder / f"{name}.md").write_text(f"# {title}\n\n{line}{table}")


def _command() -> str:
    """As it was typed, without this machine's folders."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for before, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False):
        words.append("FOLDER" if before in ("--images", "--cache", "--output", "--root") else word)
    return " ".join(words).replace(" --output FOLDER", "").replace(" --cache FOLDER", "")


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split())
