"""Makes text from outside safe to show: on a terminal, in a file of lines, in a web page, in a spreadsheet.

Class names, file names, run names, notes, log lines and reasons may hold anything that a file can hold.
"""

import re

# Characters that str.isprintable() accepts although they show nothing: fillers, joiners and variation selectors.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # ASCII and full-width


def escape(text: object, keep: str = "") -> str:
    r"""Returns text in which each character can be seen, and none acts on a terminal. Other text stays as it is.

    Replaces these by the escape that Python and JSON use, such as \x1b, \n, \u202e or \udcff: control characters (ESC,
    newline, CR, tab, bell, C1), characters that change the direction of text, characters without width, spaces other
    than " ", line and paragraph separators, surrogates (undecodable bytes of a file name), and private or unassigned
    code points. Square brackets stay: print the text with a rich Console that has markup=False and emoji=False.

    keep: control characters to leave, such as "\n" for a text of several lines.
    """
    text = str(text)
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    escapes = {  # by the characters that occur, because a report page has hundreds of thousands
        ord(character): character.encode("unicode_escape").decode()
        for character in set(text) - set(keep)
        if not is_visible(character)
    }
    return text.translate(escapes)


def is_visible(character: str) -> bool:
    """Returns whether escape() leaves a character as it is."""
    return character.isprintable() and not _INVISIBLE.match(character)


def escape_cell(text: object) -> str:
    """Returns escape(text) for a cell of a CSV file, with an apostrophe in front if a spreadsheet would calculate it.

    A spreadsheet takes text for a formula if it starts with =, +, - or @, perhaps after spaces.
    """
    cell = escape(text)
    return f"'{cell}" if cell.lstrip().startswith(_FORMULA_STARTS) else cell


def one_line(text: object, length: int | None = 160) -> str:
    """Returns a text such as the message of an error in one line, with single spaces.

    length: number of characters after which it is cut off; None keeps all.
    """
    return " ".join(str(text).split())[:length]


def shorten(text: str, length: int) -> str:
    """Returns a text of at most `length` characters. Cuts the middle: names of a sweep differ at their end."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"
