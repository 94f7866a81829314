"""What is printed: text of others that can't drive the terminal, and lines that fit it."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

COLUMNS = 100               # of a line, at most


def printable(text: Any) -> str:
    """Text with U+FFFD for what can't be printed: terminal codes, bidirectional overrides, half a surrogate pair."""
    return "".join(c if c.isprintable() or c in "\n\t\u00a0" else "\ufffd" for c in str(text))


def say(text: Any, file: Any = None) -> None:
    """Print a line, past a progress bar if there is one. All that a run prints comes through here: names of games, goals, skills,
    paths and causes are others' text."""
    tqdm.write(printable(text), file=file)
    (file or sys.stdout).flush()


def columns() -> int:
    """How long a line may be: COLUMNS, and on a narrower terminal as much as it has."""
    return min(COLUMNS, shutil.get_terminal_size().columns - 1) if sys.stdout.isatty() else COLUMNS


def folded(text: str) -> str:
    """Prose on lines that fit, cut between words.

    >>> print(folded("word " * 22))
    word word word word word word word word word word word word word word word word word word word word
         word word
    """
    return textwrap.fill(text, columns(), subsequent_indent="     ", break_long_words=False, break_on_hyphens=False)


def fitted(fields: Sequence[tuple[int, str]], indent: int = 0) -> str:
    """One line that fits, of the fields in their order. Each comes with the rank at which it gets
    its place: where there is too little room, those of the highest ranks are left out.

    >>> fitted([(0, "plain 0.25"), (2, "x" * 90), (1, "eta 3h12"), (1, "")])
    'plain 0.25  eta 3h12'
    """
    room, kept = columns() - indent + 2, list[int]()
    for place, (_, text) in sorted(enumerate(fields), key=lambda field: field[1][0]):
        if text and len(text) + 2 <= room:
            kept.append(place)
            room -= len(text) + 2
    return "  ".join(fields[place][1] for place in sorted(kept)).rstrip()
