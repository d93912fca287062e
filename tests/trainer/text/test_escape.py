"""Text from outside shows each of its characters, and none acts on a terminal, a page or a spreadsheet."""

import csv
import io
import random
import sys

import pytest

from trainer.errors import PeerError, UserError, suggest_choice
from trainer.text.escape import escape, escape_cell, is_visible, one_line, shorten

HOSTILE = {
    "ESC": "\x1b", "bell": "\a", "newline": "\n", "CR": "\r", "tab": "\t", "NUL": "\0", "DEL": "\x7f", "C1": "\x9b",
    "next line": "\x85", "bidi": "\u202e", "isolate": "\u2066", "zero width": "\u200b", "joiner": "\u200d",
    "byte order mark": "\ufeff", "soft hyphen": "\xad", "line": "\u2028", "paragraph": "\u2029", "no-break": "\xa0",
    "wide space": "\u3000", "surrogate": "\udcff", "tag": "\U000e0041", "filler": "\u3164", "braille blank": "\u2800",
    "variation": "\ufe0f", "grapheme joiner": "\u034f", "private": "\ue000", "noncharacter": "\uffff",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_character_that_acts_or_hides_is_escaped(name: str) -> None:
    shown = escape(f"a{HOSTILE[name]}b")
    assert shown.isascii() and shown.isprintable() and shown[0] + shown[-1] == "ab" and shown[1] == "\\"


@pytest.mark.parametrize(
    "text", ["", "cat", "[bold]x[/]", ":smile:", "ünï", "猫", "é", "a\\nb", "<b>&", "ein Hund", "🐕"]
)
def test_visible_text_stays(text: str) -> None:
    assert escape(text) == text


def test_kept_characters_stay() -> None:
    assert escape("a\nb\tc\r\x1b", keep="\n\t") == "a\nb\tc\\r\\x1b"


def test_any_text_is_shown_visibly_and_only_once_escaped() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(chr(draw.choice((draw.randrange(0x300), draw.randrange(sys.maxunicode + 1)))) for _ in range(8))
        shown = escape(text)
        assert all(map(is_visible, shown)) and escape(shown) == shown
        shown.encode()
        cells = next(csv.reader(io.StringIO(f'"{escape_cell(text).replace(chr(34), chr(34) * 2)}"')))
        assert cells[0].lstrip()[:1] not in tuple("=+-@\t\r")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\uff1d1", "=HYPERLINK(1).png", "-"])
def test_cell_that_a_spreadsheet_would_calculate_begins_with_an_apostrophe(text: str) -> None:
    assert escape_cell(text) == f"'{text}"


def test_other_cells_stay() -> None:
    assert [escape_cell(text) for text in ("cat", "a=b", "1", "\t=1", "a;=1")] == ["cat", "a=b", "1", "\\t=1", "a;=1"]


def test_message_of_several_lines_becomes_one_line_of_limited_length() -> None:
    message = ValueError(" first\n\tsecond  " + "x" * 300)
    assert one_line(message, 14) == "first second x" and len(one_line(message)) == 160
    assert one_line(message, None) == "first second " + "x" * 300


def test_shortened_text_keeps_both_ends() -> None:
    assert shorten("abcdefgh", 8) == "abcdefgh" and shorten("abcdefghi", 8) == "abc…fghi"


@pytest.mark.parametrize("kind", [UserError, PeerError])
def test_error_is_one_line_of_limited_length(kind: type[Exception]) -> None:
    text = str(kind("".join(HOSTILE.values()) + 99_999 * "x"))
    assert text.isprintable() and len(text) <= 2000


@pytest.mark.parametrize(
    ("value", "choices", "hint"),
    [
        ("gpu", ["auto", "cpu", "cuda"], "cuda"), ("GPU", ["auto", "cpu", "cuda"], "cuda"),
        ("half", ["fp16", "fp32"], "fp16"), ("bfloat16", ["auto", "bf16", "fp16"], "bf16"),
        ("false", ["auto", "off"], "off"), ("Adam", ["sgd", "adamw"], "adamw"), ("CIFAR10", ["cifar10"], "cifar10"),
    ],
)  # fmt: skip
def test_hint_is_what_people_mean(value: str, choices: list[str], hint: str) -> None:
    assert suggest_choice(value, choices).startswith(f"did you mean '{hint}'? ")


def test_no_hint_for_an_unlike_choice() -> None:
    assert suggest_choice("zebra", ["auto", "cpu"]) == "choose from auto, cpu"
