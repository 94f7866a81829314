"""Files of a run: written whole or not at all, and read with suspicion. The program, the report and the benchmark use them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import skills
from policy import UserError
from skills import FLAG, NUMBER, TEXT, Form, Optional, count, misfit
from tools.terminal import say


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename: a reader never sees half a file. UTF-8. OSError where the folder can't be written
    to."""
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)
    try:
        with aside.open("x", encoding="utf-8", errors="replace") as f:      # a new file: not one that a link leads to
            f.write(text)
        sync(aside)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


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


OWN = {"config.json", "lock", "checkpoints", "samples", "metrics.csv", "results.json", "skills.json", "report.html", "tensorboard",
       "wandb",
       *(f"{name}.tmp" for name in ("config.json", "results.json", "skills.json", "report.html"))}  # what a run makes in its folder
FILES = {"adapter_model.safetensors", "optimizer.safetensors", "progress.json", "skills.json"}         # of every checkpoint
RATE = Form(lambda x: isinstance(x, (int, float)), "a number or NaN")
PAIR = Form(lambda x: isinstance(x, list) and len(x) == 2 and all(map(NUMBER.holds, x)), "a pair of numbers")
RATES = {"n": count(), "successes": count(), "success": NUMBER, "interval": PAIR, "mean_steps": NUMBER, "invalid_rate": RATE,
         "score": Optional(RATE), "score_se": Optional(RATE), ...: skills.ANYTHING}
RESULTS = [RATES | {"label": TEXT, "iteration": count(), "panel": TEXT, "skills": FLAG, "kinds": {...: RATES},
                    "outcomes": {...: FLAG}}]


def load_results(folder: Path) -> list[dict[str, Any]]:
    """A run's evaluations. UserError if the file holds something else."""
    results = read_json(folder / "results.json", RESULTS)
    if not results:
        raise UserError(f"{folder / 'results.json'}: holds no evaluations; move it away, and evaluate again with --eval {folder}")
    return results


def refuse_links(folder: Path) -> None:
    """UserError if something of a run's folder is a link, a pipe or a device: files of a run are its own, and nothing outside the
    folder is read or written through them."""
    inside = map(folder.glob, ("samples/*", "checkpoints/*", "checkpoints/*/*"))
    for path in itertools.chain((folder / name for name in OWN), *inside):
        if os.path.lexists(path) and not (stat.S_ISREG(mode := path.lstat().st_mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path}: is a link or a device, and no file of a run; move it away")


def load_bank(path: Path) -> skills.SkillBank:
    """The bank in a checkpoint or run folder. UserError naming what is malformed in skills.json."""
    try:
        return skills.SkillBank.from_json(read_json(path / "skills.json"))
    except ValueError as e:
        raise UserError(f"{path}/skills.json: {e}; use another checkpoint") from e


def read_skills(path: Path, most: int) -> list[tuple[str, str]]:
    """Skills to begin with: (condition, strategy) of each line that is not blank, by the rules for mined ones, equal ones once.
    UserError naming a line that is none, and for none or over `most`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"--bank {path}: cannot be read as text ({e})") from e
    found: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                skill = skills.parse_skill(f"<skill>{line}</skill>")
                found.setdefault(" -> ".join(skill).casefold(), skill)
        except skills.SkillRejected as e:
            raise UserError(f"--bank {path}: line {number} is not of the form when CONDITION -> STRATEGY "
                            f"({e.reason.replace('_', ' ')}): {line.strip()[:60]}") from e
    if not 0 < len(found) <= most:
        raise UserError(f"--bank {path}: holds {len(found)} skills, expected 1 to --bank-size {most}; one a line, as: "
                        "when CONDITION -> STRATEGY")
    return [*found.values()]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first: by iterations, then by ended phases."""
    found = [path for path in folder.glob("checkpoints/*") if re.fullmatch(r"\d+(-\d+)?", path.name, re.ASCII)]
    return sorted(found, key=lambda path: [*map(int, path.name.split("-"))], reverse=True)


def phase_ends(folder: Path) -> dict[int, tuple[Path, Path]]:
    """The first and the last checkpoint that a run has between two milestones: 0 is up to the end of the first phase."""
    found: dict[int, list[Path]] = {}
    for path in reversed(checkpoints(folder)):
        found.setdefault(int(path.name.partition("-")[2] or 0), []).append(path)
    return {ended: (paths[0], paths[-1]) for ended, paths in found.items()}


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files; empty if they are as they were written."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        wrong = [name for name, digest in manifest.items() if Path(name).name != name or file_hash(checkpoint / name) != digest]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as e:
        return f"manifest.json, or a file that it names: {type(e).__name__}: {e}"
    wrong += sorted(FILES - set(manifest))
    return f"damaged: {', '.join(wrong)}" if wrong else ""


def latest_checkpoint(folder: Path) -> Path:
    """The newest sound checkpoint of a run. Says so if that is not the newest. UserError if there is none."""
    refuse_links(folder)
    found = checkpoints(folder)
    for path in found:
        if not (problem := damage(path)):
            return path
        say(f"siri: {path} cannot be used ({problem}); trying the one before", sys.stderr)
    sound = "sound " if found else ""
    raise UserError(f"{folder}: holds no {sound}checkpoint; give a run folder such as runs/NAME, whole, or train a new one")
