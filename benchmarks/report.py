"""Command-line options, workloads and result files that the benchmarks share."""

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

MAIN = str(REPOSITORY / "trainer" / "main.py")
_FOLDER_OPTIONS = ("--images", "--cache", "--output", "--root")


def make_parser(
    description: str | None, images: Literal["required", "optional", "none"] = "none", threads: bool = False
) -> argparse.ArgumentParser:
    """Returns a parser with --output, and with --images and --cache, and --threads, if the benchmark uses them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if threads:
        cores = len(os.sched_getaffinity(0))
        parser.add_argument("--threads", type=int, default=cores, help="CPU threads; default: all cores")
    if images != "none":
        text = "CIFAR-10 as image files: train/<class>/*, test/<class>/*"
        parser.add_argument("--images", type=Path, required=images == "required", help=text)
        parser.add_argument("--cache", type=Path, help="folder for the decoded images; default: beside the images")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder for the result files"
    )
    return parser


class Workload(NamedTuple):
    """A network and the batch size it is trained with."""

    model: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}"

    @property
    def settings(self) -> dict[str, Any]:
        """The workload's part of a contestant's settings."""
        return self._asdict()

    def images_per_second(self, step_seconds: list[float]) -> float:
        """Returns the speed at the median of the step times."""
        return round(self.batch_size / statistics.median(step_seconds), 1)


def add_workloads(parser: argparse.ArgumentParser) -> None:
    """Adds --models MODEL:BATCH_SIZE..."""

    def parse(text: str) -> Workload:
        model, _, batch_size = text.partition(":")
        return Workload(model, int(batch_size))

    default = [Workload("lenet", 64), Workload("tudui", 64), Workload("resnet18", 128)]
    parser.add_argument("--models", nargs="+", type=parse, default=default, metavar="MODEL:BATCH_SIZE")


def contestant_settings(arguments: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """Returns the settings of a contestant: threads, images and cache from the command line, and the given ones."""
    return {
        "threads": arguments.threads, "images": str(arguments.images),
        "cache": str(arguments.cache) if arguments.cache else None,
    } | settings  # fmt: skip


def data_overrides(arguments: argparse.Namespace) -> list[str]:
    """Returns the section.key=value words with which samecurve reads the images of --images."""
    cache = [f"data.cache_dir={arguments.cache}"] if arguments.cache else []
    return ["data.name=image_folder", f"data.root={arguments.images}", *cache]


def table(head: str, rows: list[str]) -> str:
    """Returns a Markdown table. head and rows have the form 'a | b | c'."""
    lines = [head, " | ".join("---" for _ in head.split("|")), *rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def describe_machine() -> dict[str, Any]:
    """Returns the hardware and versions of this machine, for the result files."""
    import torch

    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "native_bf16": bool({"amx_bf16", "avx512_bf16", "bf16"} & _cpu_flags()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(folder: Path, name: str, description: str | None, result: dict[str, Any], text: str) -> None:
    """Writes NAME.json with the result, and NAME.md with `text`; both with the command and the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    command = _command()
    (folder / f"{name}.json").write_text(json.dumps({"command": command, "machine": machine} | result, indent=1) + "\n")
    gpu = machine["gpu"] or ("CPU with native bf16" if machine["native_bf16"] else "CPU without native bf16")
    title = (description or name).partition("\n")[0]
    versions = f"{machine['cores']} cores, {gpu}, Python {machine['python']}, torch {machine['torch']}."
    (folder / f"{name}.md").write_text(f"# {title}\n\n`{command}`\n\n{versions}\n\n{text}")


def _command() -> str:
    """Returns the command line without the paths of this machine."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for previous, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False):
        words.append("FOLDER" if previous in _FOLDER_OPTIONS else word)
    return " ".join(words).replace(" --output FOLDER", "").replace(" --cache FOLDER", "")


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split())
