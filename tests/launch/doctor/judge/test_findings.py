"""Text and JSON of findings."""

import json

from launch.doctor.judge.findings import Finding, has_failure, to_json, to_text

FAILURE = Finding("data", "n2", "fail", "no folder", "photos", "put them there")
OK = Finding("clock", "n1", "ok", "within 2 s")


def test_text_lists_failures_first_with_their_fix() -> None:
    lines = to_text([OK, Finding("disk", "n1", "warning", "full"), FAILURE], "title").splitlines()
    assert lines[0] == "title" and lines[1].split() == ["FAIL", "data", "n2:", "no", "folder"]
    assert lines[2].strip() == "expected: photos" and lines[3].strip() == "fix: put them there"
    assert lines[4].startswith("warning  disk")
    assert lines[-2:] == ["ok       clock  within 2 s", "1 failed, 1 warnings, 1 ok"]


def test_text_names_nodes_when_the_check_failed_elsewhere() -> None:
    entries = [Finding("data", f"n{number}", "ok", "two classes") for number in range(3, 9)]
    assert "ok       data  two classes\n" in to_text(entries, "title")
    text = to_text([FAILURE, *entries], "title")
    assert "ok       data  n3: two classes; n4: two classes; n5: two classes; n6: two classes; and 2 more\n" in text


def test_json_has_the_worst_state_and_all_findings() -> None:
    assert has_failure([OK, FAILURE]) and not has_failure([OK])
    result = json.loads(to_json([OK, FAILURE], {"nodes": ["n1"]}))
    assert result["state"] == "fail" and result["nodes"] == ["n1"]
    assert result["findings"][1] == {
        "check": "data", "node": "n2", "state": "fail", "got": "no folder", "wanted": "photos", "do": "put them there",
    }  # fmt: skip
