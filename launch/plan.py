"""What is about to be started, as a value: shown by --dry-run, compared by tests, then executed as it was shown."""

import os
import shlex
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable that a launch sets, and the reason for it."""

    name: str
    value: str
    why: str


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    title: str
    argv: tuple[str, ...]
    variables: tuple[Variable, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    """What will come of it: a name and a text each."""
    notes: tuple[str, ...] = ()
    """What the user should know before it starts."""

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with the plan's variables."""
        return os.environ | {variable.name: variable.value for variable in self.variables}

    @property
    def command(self) -> str:
        """One line for a shell that does the same."""
        assignments = [f"{variable.name}={shlex.quote(variable.value)}" for variable in self.variables]
        return " ".join([*assignments, shlex.join(self.argv)])

    def __str__(self) -> str:
        lines = [self.title, "", "command", f"  {self.command}"]
        if self.variables:
            width = max(len(f"{variable.name}={variable.value}") for variable in self.variables)
            lines += ["", "environment, besides what it is now"]
            lines += [f"  {f'{entry.name}={entry.value}':{width}}  {entry.why}" for entry in self.variables]
        if self.facts:
            width = max(len(name) for name, _ in self.facts)
            lines += ["", "the run", *(f"  {name:{width}}  {text}" for name, text in self.facts)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
