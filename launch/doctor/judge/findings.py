"""Represents findings and prints them: text with failures first, or one JSON object."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_STATES = ("fail", "warning", "ok")
_MAX_NODES_LISTED = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check of one node, pair of nodes, or all nodes."""

    check: str
    node: str
    """name of the node, `a and b` for a pair; empty: all nodes"""
    state: str
    """ok, warning, or fail: the run would fail or would not be as requested"""
    got: str
    expected: str = ""
    fix: str = ""


def has_failure(findings: Iterable[Finding]) -> bool:
    """Returns whether any finding is a failure."""
    return any(finding.state == "fail" for finding in findings)


def to_json(findings: Sequence[Finding], header: dict[str, object]) -> str:
    """Returns one line of JSON: the header, `state` (the worst one) and `findings`."""
    worst = next((state for state in _STATES if any(finding.state == state for finding in findings)), "ok")
    entries = [
        {
            "check": finding.check, "node": finding.node, "state": finding.state,
            "got": finding.got, "wanted": finding.expected, "do": finding.fix,
        }
        for finding in findings
    ]  # fmt: skip
    return json.dumps(header | {"state": worst, "findings": entries})


def to_text(findings: Sequence[Finding], title: str) -> str:
    """Returns the failures, the warnings, each with its fix, then one line per check for what is ok."""
    lines = [title]
    width = max((len(finding.check) for finding in findings), default=0)
    indent = " " * (width + 11)
    problems = [finding for state in ("fail", "warning") for finding in findings if finding.state == state]
    for finding in problems:
        label = "FAIL" if finding.state == "fail" else finding.state
        node = f"{finding.node}: " if finding.node else ""
        lines.append(f"{label:7}  {finding.check:{width}}  {node}{finding.got}")
        lines += [f"{indent}expected: {finding.expected}"] if finding.expected else []
        lines += [f"{indent}fix: {finding.fix}"] if finding.fix else []
    passed: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.state == "ok":
            passed.setdefault(finding.check, []).append(finding)
    checks_with_problems = {finding.check for finding in problems}
    for check, entries in passed.items():
        lines.append(f"{'ok':7}  {check:{width}}  {_summarize(entries, with_names=check in checks_with_problems)}")
    counts = [f"{sum(finding.state == state for finding in findings)} {label}" for state, label in _COUNT_LABELS]
    return "\n".join([*lines, ", ".join(counts)])


_COUNT_LABELS = (("fail", "failed"), ("warning", "warnings"), ("ok", "ok"))


def _summarize(entries: Sequence[Finding], with_names: bool) -> str:
    """Returns one text for equal findings, else the first few. with_names: the check failed on other nodes."""
    texts = {entry.got for entry in entries}
    if len(texts) == 1 and not with_names:
        return entries[0].got
    listed = [f"{entry.node}: {entry.got}" if entry.node else entry.got for entry in entries[:_MAX_NODES_LISTED]]
    remaining = len(entries) - len(listed)
    return "; ".join(listed) + (f"; and {remaining} more" if remaining else "")
