"""The project's own papers are true: packages, pins, the README's commands."""

import importlib.metadata
import re
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


def test_every_package_of_ours_is_installed() -> None:
    # A flat layout installs only the packages that pyproject.toml names.
    found = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for top in ("trainer", "launch")
        for path in (REPOSITORY / top).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


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


def test_readme_has_the_two_commands() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert (
        blocks[0]
        == 'pip install -c constraints.txt -e ".[test]" && accelerate launch trainer/main.py --config digits\n'
    )
    assert blocks[1] == "pytest\n"


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "docs/design.md"])
def test_links_and_files_that_a_text_names_exist(path: str) -> None:
    text = (REPOSITORY / path).read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (REPOSITORY / path).parent.joinpath(link).exists(), link
    for name in re.findall(r"\b(?:configs|launch|trainer|tests)/[\w/.]+\.(?:yaml|py)\b", text):
        assert (REPOSITORY / name).exists(), name


def test_the_room_table_names_every_room() -> None:
    text = (REPOSITORY / "docs" / "design.md").read_text()
    for path in (REPOSITORY / "trainer").iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            assert f"`{path.name}`" in text or f"`{path.name}/`" in text, path.name


def test_no_path_of_one_machine_is_written_down() -> None:
    for path in REPOSITORY.rglob("*.py"):
        if path != Path(__file__):
            assert not re.search(r"[\"'](/work|/root|/home)/", path.read_text()), path
