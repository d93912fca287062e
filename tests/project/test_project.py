"""The packaging and the documents are true: packages, pins, links, the README's commands."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.processes import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PINS = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
}


def test_pyproject_lists_every_package() -> None:
    packages = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for top in ("trainer", "launch")
        for path in (REPOSITORY / top).rglob("__init__.py")
    }
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == packages | set(setuptools["package-dir"])
    for package, folder in setuptools["package-dir"].items():
        for pattern in setuptools["package-data"][package]:
            assert list((REPOSITORY / folder).glob(pattern)), f"{package}: no {pattern} in {folder}"
    scripts = {path.name for path in (REPOSITORY / "slurm").glob("*.sh")} - {"site.sh"}  # site.sh belongs to a cluster
    assert set(setuptools["package-data"]["launch.scripts"]) == scripts


def needed(name: str, extras: frozenset[str], seen: dict[str, None]) -> None:
    """Every package that `name` brings along on this machine, direct and indirect."""
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        environments = [{**default_environment(), "extra": extra} for extra in extras or {""}]
        if requirement.marker and not any(requirement.marker.evaluate(each) for each in environments):
            continue
        key = canonicalize_name(requirement.name)
        if key not in seen:
            seen[key] = None
            needed(key, frozenset(requirement.extras), seen)


def test_every_package_direct_and_indirect_is_pinned() -> None:
    wanted: dict[str, None] = {}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["test"], *extras["export"], *extras["dashboard"]]:
        requirement = Requirement(text)
        if requirement.name == "samecurve":  # one extra names another
            continue
        key = canonicalize_name(requirement.name)
        wanted[key] = None
        needed(key, frozenset(requirement.extras), wanted)
        assert requirement.specifier.contains(PINS[key]), f"{text} does not allow the pinned {PINS[key]}"
        assert "==" not in text, f"{text}: pyproject keeps ranges, constraints.txt pins"
    assert not [name for name in wanted if name not in PINS]


def shell_blocks(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def test_readme_has_the_two_commands() -> None:
    blocks = shell_blocks((REPOSITORY / "README.md").read_text())
    assert (
        blocks[0]
        == 'pip install -c constraints.txt -e ".[test]" && accelerate launch trainer/main.py --config digits\n'
    )
    assert blocks[1] == "pytest\n"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_readme_tour_works_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tour = next(block for block in shell_blocks((REPOSITORY / "README.md").read_text()) if "run.name=first" in block)
    for line in tour.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "samecurve"
        command = [sys.executable, str(REPOSITORY / "launch" / "main.py"), *words[1:]]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")),
]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_and_named_files_exist(path: str) -> None:
    text = (REPOSITORY / path).read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (REPOSITORY / path).parent.joinpath(link).exists(), link
    for name in re.findall(r"`((?:configs|launch|trainer|tests|benchmarks|slurm)/[\w/.]+\.(?:yaml|py|sh))\b", text):
        is_example = name in ("trainer/models/mynet.py", "slurm/site.sh") or path == "CHANGELOG.md"
        assert is_example or (REPOSITORY / name).exists(), name


def test_design_lists_every_folder() -> None:
    text = (REPOSITORY / "docs" / "design.md").read_text()
    for top in ("trainer", "launch"):
        for path in (REPOSITORY / top).iterdir():
            if path.is_dir() and (path / "__init__.py").is_file():
                assert f"`{path.name}/`" in text, path


def test_no_path_of_one_machine_is_written_down() -> None:
    for path in REPOSITORY.rglob("*.py"):
        if path != Path(__file__):
            assert not re.search(r"[\"'](/work|/root|/home)/", path.read_text()), path
