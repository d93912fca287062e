"""What was found out, as a list; a text for people, failures first, or one JSON object for machines."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

_ORDER = ("fail", "warning", "ok")
_NAMES_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    node: str
    """the node, or the two of a pair with a dash; empty: all of them"""
    state: str
    """ok, warning, or fail: a run would fail, or not be what was asked for"""
    got: str
    wanted: str = ""
    do: str = ""


def failed(findings: Iterable[Finding]) -> bool:
    return any(finding.state == "fail" for finding in findings)


def to_json(findings: Sequence[Finding], about: dict[str, object]) -> str:
    """One object on one line: what was looked at, `state` (the worst one), `findings`."""
    worst = next((state for state in _ORDER if any(entry.state == state for entry in findings)), "ok")
    return json.dumps(about | {"state": worst, "findings": [asdict(entry) for entry in findings]})


def to_text(findings: Sequence[Finding], title: str) -> str:
    """The worst first, each with what to do; what is well in one line a check."""
    lines = [title]
    width = max((len(entry.check) for entry in findings), default=0)
    for state in _ORDER[:2]:
        for entry in (entry for entry in findings if entry.state == state):
            where = f"{entry.node}: " if entry.node else ""
            lines.append(f"{state.upper() if state == 'fail' else state:7}  {entry.check:{width}}  {where}{entry.got}")
            indent = " " * (width + 11)
            lines += [f"{indent}wanted: {entry.wanted}"] if entry.wanted else []
            lines += [f"{indent}do: {entry.do}"] if entry.do else []
    well: dict[str, list[Finding]] = {}
    for entry in findings:
        if entry.state == "ok":
            well.setdefault(entry.check, []).append(entry)
    troubled = {entry.check for entry in findings if entry.state != "ok"}
    for check, entries in well.items():
        lines.append(f"{'ok':7}  {check:{width}}  {_together(entries, named=check in troubled)}")
    counts = [f"{sum(entry.state == state for entry in findings)} {word}" for state, word in _COUNTED]
    return "\n".join([*lines, ", ".join(counts)])


_COUNTED = (("fail", "would fail"), ("warning", "to know of"), ("ok", "well"))


def _together(entries: Sequence[Finding], named: bool) -> str:
    """One text for nodes that say the same; else the first few. named: not all nodes do."""
    texts = dict.fromkeys(entry.got for entry in entries)
    if len(texts) == 1 and not named:
        return entries[0].got
    shown = [f"{entry.node}: {entry.got}" if entry.node else entry.got for entry in entries[:_NAMES_SHOWN]]
    more = len(entries) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
