"""Files of a run: written whole or not at all, and read with suspicion. The program, the report and the benchmark use them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import skills
from policy import UserError
from skills import FLAG, NUMBER, TEXT, Form, count, misfit


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename: a reader never sees half a file. UTF-8. OSError where the folder can't be written
    to."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8", errors="replace")
    sync(aside)
    os.replace(aside, path)


def write_json(path: Path, data: Any) -> None:
    """The data as JSON, by `write_text`."""
    write_text(path, json.dumps(data, indent=1))


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex; OSError if it can't be read."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path, form: Any = skills.ANYTHING) -> Any:
    """What a JSON file holds. UserError if it can't be read as JSON, or does not fit the form."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e}); is this a run folder?") from e
    if problem := misfit(data, form, path.stem):
        raise UserError(f"{path}: {problem}; this program did not write it so: move it away, or use another run folder")
    return data


RATES = {"n": count(), "successes": count(), "success": NUMBER, "interval": [NUMBER], "mean_steps": NUMBER,
         "invalid_rate": Form(lambda x: isinstance(x, (int, float)), "a number or NaN"), ...: skills.ANYTHING}
RESULTS = [RATES | {"label": TEXT, "iteration": count(), "panel": TEXT, "skills": FLAG, "kinds": {...: RATES},
                    "outcomes": {...: FLAG}}]


def load_results(folder: Path) -> list[dict[str, Any]]:
    """A run's evaluations. UserError if the file holds something else."""
    results = read_json(folder / "results.json", RESULTS)
    if not results:
        raise UserError(f"{folder / 'results.json'}: holds no evaluations; move it away, and evaluate again with --eval {folder}")
    return results


def load_bank(path: Path) -> skills.SkillBank:
    """The bank in a checkpoint or run folder. UserError naming what is malformed in skills.json."""
    try:
        return skills.SkillBank.from_json(read_json(path / "skills.json"))
    except ValueError as e:
        raise UserError(f"{path}/skills.json: {e}; use another checkpoint") from e
