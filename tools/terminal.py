"""What is printed: text of others that can't drive the terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def printable(text: Any) -> str:
    """Text with U+FFFD for what can't be printed: terminal codes, bidirectional overrides, half a surrogate pair."""
    return "".join(c if c.isprintable() or c in "\n\t\u00a0" else "\ufffd" for c in str(text))


def say(text: Any, file: Any = None) -> None:
    """Print a line, past a progress bar if there is one. All that a run prints comes through here: names of games, goals, skills,
    paths and causes are others' text."""
    tqdm.write(printable(text), file=file)
    (file or sys.stdout).flush()
