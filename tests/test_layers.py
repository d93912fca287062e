"""The plan of the house: imports point one way, names do not clash, rooms stay small."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

# A file may import files of lower layers only.
LAYERS = [
    {
        "errors",
        "rank_env",
        "randomness",
        "shards",
        "buffers",
        "stop",
        "stopwatch",
        "meeting",
        "outcome",
        "pairs",
        "lock",
        "memory",
        "page",
        "notation",
        "spoken",
        "chart",
        "panels",
        "tta",
        "shadow",
        "compiler_import",
    },
    {"settings"},
    {"contradictions"},
    {"config", "datasets.dataset", "schedule", "probe", "names", "buckets", "device"},
    {
        "datasets.pixels",
        "sampler",
        "augment",
        "losses",
        "meter",
        "evaluation",
        "checkpoint",
        "console",
        "group_exchange",
    },
    {"datasets.pack", "reduction"},
    {
        "datasets.cifar10",
        "datasets.image_folder",
        "datasets.digits",
        "models.small",
        "models.speedrun",
        "models.resnet",
        "models.imagenet",
    },
    {"models", "datasets", "datasets.sizes", "folder", "world", "optim"},
    {"trained", "told", "starts", "feature_maps", "logged"},
    {"figures"},
    {
        "watch",
        "saver",
        "predict",
        "export",
        "resume",
        "rank_log",
        "showing",
        "wandb_mode",
        "profiler",
    },
    {"dashboard", "trackers.tracker", "trackers.wandb_rows", "step", "data", "report"},
    {
        "trackers.lines",
        "trackers.event_files",
        "trackers.wandb_run",
        "blocks",
        "examples",
        "first_batch",
    },
    {"trackers", "bad_steps", "parts"},
    {"result", "journal"},
    {"visuals"},
    {"reporter"},
    {"loop"},
    {"main", "compare"},
    {"verify", "evaluate"},
]
LAUNCH_LAYERS = [
    {"hardware", "plan", "slurm", "relay", "table", "doctor.reach", "doctor.messages", "doctor.findings"},
    {"forecast", "jobs", "attempts", "results", "doctor.facts", "doctor.examination", "doctor.nodes"},
    {"train", "points", "records", "doctor.node", "doctor.speeds", "doctor.job"},
    {"runs", "node", "submit", "batch", "doctor.diagnosis", "doctor.torchrun"},
    {"status", "sweep", "doctor.command"},
    {"logs", "stop", "predict", "report", "dashboard"},
    {"export", "evaluate"},
    {"main"},
]
LAYER_OF = {name: height for height, names in enumerate(LAYERS) for name in names}
LAUNCH_LAYER_OF = {name: height for height, names in enumerate(LAUNCH_LAYERS) for name in names}
FILES = sorted((REPOSITORY / "trainer").rglob("*.py"))
LAUNCH_FILES = sorted((REPOSITORY / "launch").rglob("*.py"))


def name_of(path: Path, top: str = "trainer") -> str:
    parts = path.relative_to(REPOSITORY / top).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> set[str]:
    """Every module of ours that a file imports, at the top or late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write from trainer.x import y"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_lower_layers_only(path: Path) -> None:
    own = name_of(path)
    if not own:
        return
    for imported in imports_of(path):
        other = imported.removeprefix("trainer.")
        if other == own:  # a package that imports its own files
            continue
        assert not imported.startswith("launch"), f"{path} imports {imported}"
        if imported.startswith("trainer.") and other in LAYER_OF:
            assert LAYER_OF[other] < LAYER_OF[own], f"{own} imports {other}, which is not below it"


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: name_of(path, "launch"))
def test_a_file_of_the_launcher_imports_lower_layers_only(path: Path) -> None:
    own = name_of(path, "launch")
    for imported in imports_of(path):
        other = imported.removeprefix("launch.")
        if imported.startswith("launch.") and other in LAUNCH_LAYER_OF and own not in ("", "doctor"):
            assert LAUNCH_LAYER_OF[other] < LAUNCH_LAYER_OF[own], f"{own} imports {other}, which is not below it"


def test_every_file_has_a_layer() -> None:
    assert {name_of(path) for path in FILES} - {""} == set(LAYER_OF)
    assert {name_of(path, "launch") for path in LAUNCH_FILES} - {"", "doctor"} == set(LAUNCH_LAYER_OF)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_hides_a_module_of_the_standard_library(path: Path) -> None:
    # `python trainer/main.py` puts trainer/ first on sys.path: trainer/random.py would be everybody's random.
    assert path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_only_one_file_asks_the_environment_for_ranks() -> None:
    asking = [name_of(path) for path in FILES if '"RANK"' in path.read_text() or '"WORLD_SIZE"' in path.read_text()]
    assert asking == ["rank_env"]


def test_only_one_file_makes_an_accelerator() -> None:
    making = [name_of(path) for path in FILES if "Accelerator(" in path.read_text()]
    assert making == ["world"]
