"""`python tools/study.py`: the evidence. Every variant of the method on every seed of both worlds, into one file.

    python tools/study.py                                   the whole grid; the same command goes on after a kill
    python tools/study.py --seeds 0 --variants siri,gigpo   a part of it (what that needs is run, too)
    python tools/study.py --repeat alfworld/no_gate/3       a cell again, in a new folder: are its games the same?
    python tools/study.py --write                           tables and figures of README and docs, from assets/study.json
    python tools/study.py --check                           are they those of the file? (seconds)

A cell of the grid is one variant on one seed of one world: a run of siri.py. Variants are the same up to where they part, so a
cell goes on from a copy of another's checkpoint: `PLAN` says from which. All variants have the environment steps of `siri` on
the same seed, but for `gigpo_compute`, which goes on until it has trained as many tokens. Two cells run at a time, on one thread
each: on one machine a cell repeats to the byte.

The study keeps its runs in a folder of its own, and reads each when it has ended. What is in the file then is the study: the
outcome of every game of every evaluation, a row for every iteration, every skill. `tools/evidence.py` makes of it what is shown.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
import envs
from policy import UserError
from run import Lock
from tools import evidence
from tools.bench import machine
from tools.files import checkpoints, load_bank, load_results, phase_ends, write_json, write_text
from tools.make_tiny import shop_skill, skill_text
from tools.progress import clock
from tools.report import read_metrics
from tools.settings import PRESETS
from tools.terminal import say

# What decides a result, beside a world's settings. Runs of other code are not of this study.
CODE = ("siri.py", "gigpo.py", "skills.py", "distill.py", "envs.py", "policy.py", "decode.py", "run.py", "assets/tiny",
        "assets/tiny-webshop")
EVERY = 120                 # seconds from one line of progress to the next


# ---- 1. The grid ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """How a variant is run: by these flags, from a copy of the run of variant `of`. Braces are filled in from that seed's `siri`:
    environment steps, trained tokens, iterations until mining ended; `oracle` and `untrained` are files of skills."""
    flags: str
    at: str = ""            # its beginning is a copy of: "before mining", "mining", "internalize" (when they begin), or "end"
    of: str = "siri"


EQUAL = " --env-steps {steps}"                  # at most: what a variant's longer episodes take is not more than siri's took
PLAN = {
    "siri": Part("--keep-phases"),
    # As many environment steps, and as many trained tokens: internalization trains on many more.
    "gigpo": Part("--variant gigpo --warmup-max 999 --env-steps {steps}", "before mining"),
    "gigpo_compute": Part("--env-steps 0 --train-tokens {tokens}", "end", "gigpo"),
    "no_advantage": Part("--variant no_advantage" + EQUAL, "internalize"),
    "no_gate": Part("--variant no_gate" + EQUAL, "internalize"),
    # Own plain wins imitated, and no skill anywhere: is it the skill, or the extra imitation?
    "distill_plain": Part("--variant distill_plain --warmup-max {mined} --mining-max 0" + EQUAL, "before mining"),
    "random_skill": Part("--variant random_skill" + EQUAL, "mining"),
    "no_validation": Part("--variant no_validation" + EQUAL, "mining"),
    "ema": Part("--ema 0.2" + EQUAL, "mining"),
    # A bank that was written from the world's own habits, and one that a policy wrote before it had learnt anything.
    "oracle_skill": Part("--bank {oracle} --mine-every 0" + EQUAL, "mining"),
    "no_mining": Part("--bank {untrained} --mine-every 0" + EQUAL, "mining"),
    "no_warmup": Part("--variant no_warmup" + EQUAL),
    # Which steps count, or how large a step is? Weights of mean one, and steps all alike at the rate that weights leave (their
    # mean is about .45). Then in games of 20 steps in which the policy strays: nearly half of a guided win's steps are useless.
    "mean_one": Part("--weight-mean one" + EQUAL, "internalize"),
    "uniform_small": Part("--variant no_advantage --lambda-max 2.25" + EQUAL, "internalize"),
    "response": Part("--distill-tokens response" + EQUAL, "internalize"),
    "a_max_1": Part("--a-max 1" + EQUAL, "internalize"),
    "stray": Part("--keep-phases --temperature 1.7 --max-steps 20"),
    "stray_no_advantage": Part("--variant no_advantage", "internalize", "stray"),
    "stray_mean_one": Part("--weight-mean one", "internalize", "stray"),
    "stray_uniform_small": Part("--variant no_advantage --lambda-max 2.25", "internalize", "stray"),
    "untrained": Part("--variant no_warmup --mining-max 3 --distill-max 0 --panel 1 --no-base-eval --lr 1e-30"),
}
PUZZLE = ("mean_one", "uniform_small", "response", "a_max_1",
          "stray", "stray_no_advantage", "stray_mean_one", "stray_uniform_small")
COST = {"": 1.0, "before mining": 0.6, "mining": 0.75, "internalize": 0.4, "end": 0.3}       # of a whole run, about


class Cell(NamedTuple):
    """One run of the grid."""
    world: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return "/".join(map(str, self))

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"{self.world}-{self.variant}-seed{self.seed}"

    def needs(self) -> list[Cell]:
        """Cells that have to be done first."""
        part = PLAN[self.variant]
        wanted = {part.of} if part.at else set()
        wanted |= {"siri"} & {"siri" for name in ("{steps}", "{tokens}", "{mined}") if name in part.flags}
        wanted |= {"untrained"} if "{untrained}" in part.flags else set()
        return [self._replace(variant=variant) for variant in sorted(wanted)]

    @classmethod
    def read(cls, text: str) -> Cell:
        """UserError if there is no such cell."""
        world, _, rest = text.partition("/")
        variant, _, seed = rest.partition("/")
        if world not in WORLDS or variant not in PLAN or not seed.isdecimal():
            raise UserError(f"{text}: is no cell of the grid; give WORLD/VARIANT/SEED, as alfworld/no_gate/3")
        return cls(world, variant, int(seed))


WORLDS = {"alfworld": 5, "webshop": 3}          # seeds that are reported, from 0 on


def grid(worlds: Sequence[str], variants: Sequence[str], seeds: Sequence[int] | None) -> list[Cell]:
    """The cells asked for and what they need, in an order in which each can be run, those of a variant together. The puzzle of the
    weights is asked in the household alone."""
    cells: dict[Cell, None] = {}

    def add(cell: Cell) -> None:
        for other in cell.needs():
            add(other)
        cells.setdefault(cell)

    for variant in variants:
        for world in worlds if variant not in PUZZLE else ["alfworld"]:
            for seed in range(WORLDS[world]) if seeds is None else seeds:
                add(Cell(world, variant, seed))
    return [*cells]


# ---- 2. A cell -----------------------------------------------------------------------------------------------


class Study:
    """The study's folder: `runs/` with a run for each cell, and the cells that are done, each with what its run has said."""

    def __init__(self, folder: Path, preset: str) -> None:
        self.folder, self.file = folder, folder / "study.json"
        folder.mkdir(parents=True, exist_ok=True)
        on = machine()
        self.data: dict[str, Any] = dict(
            preset=preset, settings={world: PRESETS[preset][world] for world in WORLDS}, code=fingerprint(),
            commit=(on["commit"] or "unknown")[:7], begun=on["date"][:10],
            device=f"{on['processor']}, {on['cores']} cores", versions=on["versions"], cells={})
        if self.file.exists():
            found = evidence.read(self.file)
            there = {cell.partition("/")[0] for cell in found["cells"]}
            for name in ("preset", "code"):
                if found[name] != self.data[name]:
                    raise UserError(f"{self.file}: is of another {name} ({found[name]}, and this is {self.data[name]}); a study "
                                    "is of one: give another --folder")
            if changed := [w for w in WORLDS if w in there and found["settings"][w] != self.data["settings"][w]]:
                raise UserError(f"{self.file}: preset {preset} had other settings for {changed[0]}; give another --folder")
            self.data = found | dict(settings=self.data["settings"])

    def save(self) -> None:
        """Write the file, a line for each cell."""
        write_text(self.file, evidence.text(self.data))

    def run(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.folder / "runs" / cell.name

    def command(self, cell: Cell) -> list[str]:
        """Begin a cell, or go on with it. Its copy is made here."""
        part, folder = PLAN[cell.variant], self.run(cell)
        if not checkpoints(folder) and part.at:
            branch(self.run(cell._replace(variant=part.of)), part.at, folder)
        flags = shlex.split(part.flags.format(**self.found(cell)))
        if checkpoints(folder):
            flags = ["--resume", str(folder), *flags]
        else:
            flags = ["--env", cell.world, "--preset", self.data["preset"], "--seed", str(cell.seed), "--name", cell.name, *flags]
        return [sys.executable, str(ROOT / "siri.py"), *flags]

    def found(self, cell: Cell) -> dict[str, Any]:
        """What flags are filled in with."""
        siri = self.data["cells"].get(str(cell._replace(variant="siri")))
        said: dict[str, Any] = {}
        if siri:
            phase, steps, tokens = (siri["rows"][name] for name in ("phase", "env_steps", "train_tokens"))
            said = dict(steps=steps[-1], tokens=tokens[-1], mined=sum(p < 2 for p in phase))
        for name, write in (("oracle", oracle_bank), ("untrained", self.untrained_bank)):
            if f"{{{name}}}" in PLAN[cell.variant].flags:
                path = self.folder / f"{cell.world}-{name}-seed{cell.seed}.txt"
                write_text(path, "\n".join(write(cell)) + "\n")
                said[name] = path
        return said

    def untrained_bank(self, cell: Cell) -> list[str]:
        """Skills that a policy wrote whose weights had not moved."""
        return [skill["text"] for skill in self.data["cells"][str(cell._replace(variant="untrained"))]["bank"]]

    def start(self, cell: Cell) -> subprocess.Popen:
        """Run a cell, on one thread, its lines in a log beside its run."""
        command, log = self.command(cell), self.run(cell).with_suffix(".log")
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as out:
            return subprocess.Popen(command, cwd=self.folder, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                    env=os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"), start_new_session=True)

    def is_free(self, cell: Cell) -> bool:
        """Whether no process has the cell's run: one may have outlived a study that was killed."""
        if not self.run(cell).is_dir():
            return True
        try:
            with closing(Lock(self.run(cell))):
                return True
        except UserError:
            return False


def oracle_bank(cell: Cell) -> list[str]:
    """A truthful bank, written from the world's own habits: no policy could mine a better one."""
    if cell.world == "webshop":
        return [shop_skill(quality, brand) for quality, brand in envs.shop_habits(random.Random(f"shop/{cell.seed}")).items()]
    return [skill_text(thing.lower(), place.lower()) for thing, place in envs.Household(cell.seed).habit.items()]


def branch(source: Path, at: str, target: Path) -> None:
    """A copy of a run as it was: "before mining" at the end of warm-up, "mining" and "internalize" when these began, "end" whole.
    siri.py cuts the table of metrics to where the checkpoint is, and the evaluations are cut here."""
    shutil.rmtree(target, ignore_errors=True)
    ends = phase_ends(source)
    checkpoint = dict(end=checkpoints(source)[0]) | {
        name: ends[ended][last] for name, ended, last in (
            ("before mining", 0, 1), ("mining", 1, 0), ("internalize", 2, 0)) if ended in ends}
    if at not in checkpoint:
        raise UserError(f"{source}: has no checkpoint of {at}; remove it, and the study runs it again")
    aside = target.with_name(target.name + ".aside")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(checkpoint[at], aside / "checkpoints" / checkpoint[at].name)
    for name in ("config.json", "metrics.csv"):
        shutil.copy(source / name, aside / name)
    iteration = int(checkpoint[at].name.split("-")[0])
    results = [r for r in load_results(source) if r["iteration"] <= iteration and (r["label"] != "final" or at == "end")]
    write_json(aside / "results.json", results)
    os.replace(aside, target)


COLUMNS = ("phase", "env_steps", "train_tokens", "seconds", "success_plain", "n_plain", "success_skill", "n_skill", "kl",
           "invalid_rate", "detour", "internal_rows", "skills_candidate", "skills_active", "skills_retired")


def told(folder: Path) -> dict[str, Any]:
    """What a run that has ended says: evaluations game by game, a column for each metric, and its bank."""
    results, rows = load_results(folder), read_metrics(folder / "metrics.csv")[0]
    tokens = 0.0
    for row in rows:
        row["train_tokens"] = tokens = tokens + row["row_tokens"]
    bank = load_bank(folder)
    return dict(
        evaluations=[dict(label=r["label"], iteration=r["iteration"], panel=r["panel"], env_steps=r.get("env_steps", 0),
                          won="".join("01"[won] for won in r["outcomes"].values()), invalid_rate=round(r["invalid_rate"], 4),
                          mean_steps=round(r["mean_steps"], 4),
                          **({"score": round(r["score"], 4)} if "score" in r else {}))
                     for r in results],
        rows={name: [tidy(row[name]) for row in rows] for name in COLUMNS},
        evaluation_s=round(sum(r["seconds"] for r in results), 1), peak_gib=max(row["peak_gib"] for row in rows),
        bank=[dict(text=skill.text, state=skill.state, born=skill.born, n=skill.n, utility=round(bank.utility(skill), 4),
                   effects=[[i, round(delta, 4)] for i, delta in skill.effects]) for skill in bank.skills])


def tidy(x: float) -> float | None:
    """A number as the file has it: whole numbers whole, others to four digits, none for nan."""
    return None if x != x else int(x) if x == int(x) else round(x, 4)


# ---- 3. The loop ---------------------------------------------------------------------------------------------


class Stop(Exception):
    """A signal came."""


def raise_stop(number: int, frame: Any) -> None:
    """The handler of signals."""
    raise Stop


def work(study: Study, cells: Sequence[Cell], jobs: int) -> list[Cell]:
    """Run the cells that are not done, `jobs` at a time. Returns those that failed or could not be begun. Raises Stop after a
    signal, once the runs have saved."""
    done, failed = study.data["cells"], list[Cell]()
    waiting, running = [cell for cell in cells if str(cell) not in done], dict[Cell, tuple[subprocess.Popen, float]]()
    fresh, shown = list[tuple[Cell, float]](), time.monotonic()
    try:
        while waiting or running:
            for cell in [*waiting]:
                if any(need in failed for need in cell.needs()):
                    waiting.remove(cell)
                    failed.append(cell)
                elif len(running) < jobs and all(str(need) in done for need in cell.needs()) and study.is_free(cell):
                    waiting.remove(cell)
                    running[cell] = study.start(cell), time.monotonic()
            time.sleep(0.5)
            for cell, (process, began) in [*running.items()]:
                if process.poll() is None:
                    continue
                del running[cell]
                took = time.monotonic() - began
                if process.returncode:
                    failed.append(cell)
                    last = (study.run(cell).with_suffix(".log").read_text().splitlines() or [""])[-1]
                    say(f"siri: {cell} ended with {process.returncode}: {last[:200]}", sys.stderr)
                    continue
                done[str(cell)] = told(study.run(cell))
                study.save()
                fresh.append((cell, took))
                say(f"{len(done):4d} done  {cell}  {summary(done[str(cell)])}  {clock(took)}  "
                    f"{outlook(waiting, running, fresh, jobs)}")
                shown = time.monotonic()
            if time.monotonic() - shown > EVERY:
                shown = time.monotonic()
                say(f"     running {', '.join(f'{cell} ({iterations(study.run(cell))} iterations)' for cell in running)}; "
                    f"{outlook(waiting, running, fresh, jobs)}")
    except Stop:
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)             # saved, as every run is
        for process, _ in running.values():
            process.wait()
        raise
    return failed


def summary(cell: dict[str, Any]) -> str:
    """The last evaluation."""
    return "".join(f"{e['label']} {e['won'].count('1') / len(e['won']):.3f}" for e in cell["evaluations"][-1:])


def iterations(folder: Path) -> int:
    """How many a run has done."""
    table = folder / "metrics.csv"
    return max(len(table.read_bytes().splitlines()) - 1, 0) if table.exists() else 0


def outlook(waiting: Sequence[Cell], running: dict[Cell, Any], fresh: Sequence[tuple[Cell, float]], jobs: int) -> str:
    """What is left and how long it may take, by what cells have taken so far."""
    cost = lambda cell: COST[PLAN[cell.variant].at]
    if not fresh:
        return f"{len(waiting) + len(running)} left"
    unit = sum(took for _, took in fresh) / sum(cost(cell) for cell, _ in fresh)
    now = time.monotonic()
    left = sum(map(cost, waiting)) * unit
    left += sum(max(cost(cell) * unit - (now - began), 0) for cell, (_, began) in running.items())
    return f"{len(waiting) + len(running)} left, eta {clock(left / jobs)}"


def fingerprint() -> str:
    """Of the code and the weights that decide a result."""
    digest = hashlib.sha256()
    for name in CODE:
        path = ROOT / name
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def repeat(study: Study, cell: Cell) -> bool:
    """Run a cell, and what it needs, again in a new folder. Returns whether all but times is the same."""
    again = Study(study.folder / "repeat", study.data["preset"])
    if work(again, grid([cell.world], [cell.variant], [cell.seed]), 1):
        raise UserError(f"{cell}: could not be repeated; its log is in {again.folder}")
    first, second = (lasting(s.data["cells"][str(cell)]) for s in (study, again))
    return first == second


def lasting(cell: dict[str, Any]) -> dict[str, Any]:
    """All of a cell that does not depend on how busy the machine was."""
    return {k: v for k, v in cell.items() if k not in ("evaluation_s", "peak_gib")} | dict(
        rows={name: column for name, column in cell["rows"].items() if name != "seconds"})


# ---- 4. Command line -----------------------------------------------------------------------------------------


def seeds_of(text: str) -> list[int]:
    """Seeds, as 0,1,4 or 100-104. UserError for another form."""
    found: list[int] = []
    for part in text.split(","):
        if not (m := re.fullmatch(r"(\d+)(?:-(\d+))?", part)):
            raise UserError(f"--seeds {text}: give numbers, as 0,1,4 or 100-104")
        found += range(int(m[1]), int(m[2] or m[1]) + 1)
    return found


def names_of(text: str, known: Sequence[str], flag: str) -> list[str]:
    """Names, separated by commas. UserError for one that there isn't."""
    for name in text.split(","):
        if name not in known:
            raise UserError(f"{flag} {name}: must be one of {', '.join(known)}")
    return text.split(",")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. UserError if bad."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].partition(": ")[2], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study", help="of its runs (default runs/study)")
    parser.add_argument("--preset", default="tiny", choices=[*PRESETS])
    parser.add_argument("--worlds", default=",".join(WORLDS), help="default all: %(default)s")
    parser.add_argument("--variants", default=",".join(PLAN), help="default all: %(default)s")
    parser.add_argument("--seeds", help="as 0,1,4 or 100-104; default the reported ones: "
                        + ", ".join(f"{world} 0-{n - 1}" for world, n in WORLDS.items()))
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (default 2)")
    parser.add_argument("--trial", action="append", default=[], metavar="NAME=AT:FLAGS",
                        help="one more variant, to choose settings: \"slow=internalize:--distill-lr 5e-4\"; AT empty: a whole run")
    parser.add_argument("--repeat", metavar="CELL", help="run a cell again and compare: alfworld/no_gate/3")
    parser.add_argument("--write", action="store_true", help="make tables and figures from assets/study.json")
    parser.add_argument("--check", action="store_true", help="compare tables and texts with assets/study.json")
    chosen = parser.parse_args(argv)
    for trial in chosen.trial:
        name, _, how = trial.partition("=")
        at, _, flags = how.partition(":")
        if not re.fullmatch(r"\w+", name) or at not in COST or name in PLAN:
            raise UserError(f"--trial {trial}: give NAME=AT:FLAGS with a new name, AT one of {', '.join(map(repr, COST))}")
        PLAN[name] = Part(flags, at)
        chosen.variants += f",{name}"
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 if cells failed or a page differs from the file; 2 for bad input; 130 when stopped."""
    try:
        chosen = parse(sys.argv[1:] if argv is None else argv)
        if chosen.check or chosen.write:
            return evidence.command(chosen.write)
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, raise_stop)
        with ExitStack() as held:
            study = Study(chosen.folder.resolve(), chosen.preset)
            held.enter_context(closing(Lock(study.folder)))
            if chosen.repeat:
                same = repeat(study, Cell.read(chosen.repeat))
                say(f"{chosen.repeat}: {'the same' if same else 'NOT the same'}, game by game and iteration by iteration")
                return 0 if same else 1
            cells = grid(names_of(chosen.worlds, [*WORLDS], "--worlds"), names_of(chosen.variants, [*PLAN], "--variants"),
                         seeds_of(chosen.seeds) if chosen.seeds else None)
            say(f"{len(cells)} cells, of which {sum(str(cell) in study.data['cells'] for cell in cells)} are done; {study.file}")
            failed = work(study, cells, chosen.jobs)
            if failed:
                say(f"siri: {len(failed)} cells are missing: {', '.join(map(str, failed))}; mend the cause, then the same command",
                    sys.stderr)
            return 1 if failed else 0
    except UserError as e:
        say(f"siri: {e}", sys.stderr)
        return 2
    except OSError as e:
        say(f"siri: {e.filename or 'output'}: {e.strerror or e}", sys.stderr)
        return 2
    except Stop:
        say("stopped; the same command goes on", sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
