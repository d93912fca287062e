"""Imports point one way, by folder; no file hides a module of the standard library; folders stay small."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import REPOSITORY

# Each folder, or file of a package's own folder, imports from its own and from those before it. trainer never imports
# launch; launch imports any of trainer.
TRAINER = "text errors format memory rng timer config distributed process run data models optim inference step build"
TRAINER += " tracking nonfinite report summary loop session main verify"
LAUNCH = "hardware plan signals forecast preflight elastic torchrun slurm runs dashboard doctor verify commands main"
ORDER = {f"trainer.{name}": height for height, name in enumerate(TRAINER.split())}
ORDER |= {f"launch.{name}": 100 + height for height, name in enumerate(LAUNCH.split())}
FILES = [path for top in ("trainer", "launch") for path in sorted((REPOSITORY / top).rglob("*.py"))]
MOST_FILES = 13


def module(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Yields the modules that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write from trainer.x import y"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def height(name: str) -> int | None:
    return ORDER.get(".".join(name.split(".")[:2]))


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_file_imports_only_from_folders_before_its_own(path: Path) -> None:
    own = height(module(path))
    if "." not in module(path):  # the packages' own __init__.py
        assert not list(imports(path))
        return
    assert own is not None, f"{module(path)}: add its folder to the order above"
    for name in imports(path):
        other = height(name)
        assert other is None or other <= own, f"{module(path)} imports {name}, whose folder comes after its own"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_file_begins_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_script_hides_a_module_of_the_standard_library() -> None:
    # `python trainer/main.py` puts trainer/ first on sys.path: every import of random would find trainer/random.py.
    script_folders = {path.parent for path in FILES if '__name__ == "__main__"' in path.read_text()}
    assert REPOSITORY / "trainer" in script_folders and REPOSITORY / "launch" in script_folders
    assert not {path.stem for path in FILES if path.parent in script_folders} & sys.stdlib_module_names


def test_no_folder_has_too_many_files() -> None:
    counts = {folder: len(list(folder.glob("*.py"))) for folder in {path.parent for path in FILES}}
    assert not {str(folder): count for folder, count in counts.items() if count > MOST_FILES + 1}  # and __init__.py


def test_only_one_file_reads_the_rank_variables() -> None:
    texts = {module(path): path.read_text() for path in FILES if module(path).startswith("trainer")}
    assert [name for name, text in texts.items() if '"RANK"' in text or '"WORLD_SIZE"' in text] == [
        "trainer.distributed.environment"
    ]


def test_only_one_file_makes_an_accelerator() -> None:
    assert [module(path) for path in FILES if "Accelerator(" in path.read_text()] == ["trainer.distributed.world"]
