"""Notebooks for a class: `python tools/class_copy.py [FOLDER]` writes the lessons without outputs and without answers.

Cells with the tag `answer` are left out, which are those that tell what a prediction should have been and that show what an
exercise asks for; so is the notebook of solutions. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

LESSONS = Path(__file__).resolve().parent.parent / "notebooks"
PLACEHOLDER = "https://github.com/OWNER/siri"       # the address in every first cell


def cleared(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook (the JSON of nbformat 4) as nobody has run it yet, and without the cells that hold answers."""
    asked = [cell for cell in notebook["cells"] if "answer" not in cell["metadata"].get("tags", [])]
    unrun = dict(outputs=[], execution_count=None)
    return notebook | {"cells": [cell | unrun if cell["cell_type"] == "code" else cell for cell in asked]}


def class_copy(folder: Path, repository: str = PLACEHOLDER) -> list[Path]:
    """Write the numbered lessons into a new or empty folder, with the address from which Colab clones. Returns their paths.
    SystemExit for what is no address, and if the folder
    holds something: it may be what a class has written."""
    if re.search(r"[\s\"'\\]", repository):
        raise SystemExit(f"siri: --repository {repository}: no address; it looks like {PLACEHOLDER}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"siri: {folder} is there already and not empty: name another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    lessons = sorted(LESSONS.glob("[0-9]_*.ipynb"))
    for path in lessons:
        text = json.dumps(cleared(json.loads(path.read_text(encoding="utf-8"))), indent=1, ensure_ascii=False)
        (folder / path.name).write_text(text.replace(PLACEHOLDER, repository) + "\n", encoding="utf-8")
    return [folder / path.name for path in lessons]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Notebooks for a class: without outputs and answers.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("class"), help="where to (default: class)")
    parser.add_argument("--repository", default=PLACEHOLDER, help="the address from which Colab shall clone")
    given = parser.parse_args()
    print(f"{len(class_copy(given.folder, given.repository))} notebooks without outputs and answers: {given.folder}")
