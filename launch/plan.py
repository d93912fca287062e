"""Defines LaunchPlan, the command and environment of a launch, which --dry-run prints and the launcher executes."""

import os
import shlex
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EnvironmentVariable:
    """An environment variable that a launch sets, with the reason that the plan shows."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """A command, its environment variables and what the user should know before it starts."""

    title: str
    argv: tuple[str, ...]
    variables: tuple[EnvironmentVariable, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    """the forecast of the run, as (name, text)"""
    notes: tuple[str, ...] = ()
    """warnings, one line each"""

    @property
    def assignments(self) -> dict[str, str]:
        """Returns the variables of the plan by name."""
        return {variable.name: variable.value for variable in self.variables}

    @property
    def environment(self) -> dict[str, str]:
        """Returns the environment of this process with the variables of the plan added."""
        return os.environ | self.assignments

    @property
    def command(self) -> str:
        """Returns an equivalent shell command in one line."""
        assignments = [f"{variable.name}={shlex.quote(variable.value)}" for variable in self.variables]
        return " ".join([*assignments, shlex.join(self.argv)])

    def __str__(self) -> str:
        """Returns the plan as --dry-run prints it. The environment of this process is left out: it may hold secrets."""
        lines = [self.title, "", "command", f"  {self.command}"]
        if self.variables:
            width = max(len(f"{variable.name}={variable.value}") for variable in self.variables)
            lines += ["", "added environment variables"]
            lines += [
                f"  {f'{variable.name}={variable.value}':{width}}  {variable.reason}" for variable in self.variables
            ]
        if self.facts:
            width = max(len(name) for name, _ in self.facts)
            lines += ["", "the run", *(f"  {name:{width}}  {text}" for name, text in self.facts)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
