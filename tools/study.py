"""`python tools/study.py`: the evidence. Every variant of the method on every seed of both worlds, into one file.

    python tools/study.py                                   the whole grid; the same command goes on after a kill
    python tools/study.py --seeds 0 --variants siri,gigpo   a part of it (what that needs is run, too)
    python tools/study.py --repeat alfworld/no_gate/3       a cell again, in a new folder: are its games the same?
    python tools/study.py --write                           what was found becomes assets/study.json, its tables and figures
    python tools/study.py --check                           are tables and figures those of assets/study.json? (seconds)

A cell of the grid is one variant on one seed of one world: a run of siri.py. Variants are the same up to where they part, so a
cell goes on from a copy of another's checkpoint: `PLAN` says from which. All play as many groups in as many iterations as `siri`
on the same seed, which takes about the same environment steps (the tables say how many); but `gigpo`, whose episodes are longer,
plays until it has taken as many steps, `gigpo_compute` until it has trained as many tokens, and both the rest of that iteration.
Two cells run at a time, on one thread each: on one machine a cell repeats to the byte.

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
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
import envs
import siri
from policy import UserError
from skills import misfit
from tools import evidence
from tools.bench import machine
from tools.files import checkpoints, damage, load_bank, load_results, phase_ends, read_json, write_json, write_text
from tools.make_tiny import shop_skill, skill_text
from tools.progress import clock
from tools.report import read_metrics
from tools.settings import PRESETS, load_config, make_environment
from tools.terminal import say

# What decides a result, beside a world's settings. Runs of other code are not of this study.
CODE = ("siri.py", "gigpo.py", "skills.py", "distill.py", "envs.py", "policy.py", "decode.py", "run.py", "tools/files.py",
        "tools/make_tiny.py", "tools/metrics.py", "tools/ranks.py", "assets/tiny", "assets/tiny-webshop")
EVERY = 120                 # seconds from one line of progress to the next


# ---- 1. The grid ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """How a variant is run: by these flags, from a copy of the run of variant `of`. Braces are filled in. From that seed's `siri`:
    environment steps, trained tokens, iterations until mining ended. `oracle` and `untrained` are files of skills. `mean` is the
    lambda with which weights of 1 are as large as those of `of` are in the mean, when its phase 2 begins."""
    flags: str
    at: str = ""            # its beginning is a copy of: "before mining", "mining", "internalize" (when they begin), or "end"
    of: str = "siri"


PLAN = {
    "siri": Part("--keep-phases"),
    # As many environment steps, and as many trained tokens: internalization trains on many more.
    "gigpo": Part("--variant gigpo --warmup-max 999 --env-steps {steps}", "before mining"),
    "gigpo_compute": Part("--env-steps 0 --train-tokens {tokens}", "end", "gigpo"),
    "no_advantage": Part("--variant no_advantage", "internalize"),
    "no_gate": Part("--variant no_gate", "internalize"),
    "no_pair_gain": Part("--no-pair-gain", "internalize"),
    # Own plain wins imitated, and no skill anywhere: is it the skill, or the extra imitation?
    "distill_plain": Part("--variant distill_plain --warmup-max {mined} --mining-max 0", "before mining"),
    "random_skill": Part("--variant random_skill", "mining"),
    "no_validation": Part("--variant no_validation", "mining"),
    "ema": Part("--ema 0.2", "mining"),
    # A bank that was written from the world's own habits, and one that a policy wrote before it had learnt anything.
    "oracle_skill": Part("--bank {oracle} --mine-every 0", "mining"),
    "no_mining": Part("--bank {untrained} --mine-every 0", "mining"),
    "no_warmup": Part("--variant no_warmup --warmup-max {mined} --mining-max 0"),       # it mines for as long as both phases took
    # Which steps count, or how large a step is? Weights of mean one, and steps all alike at the rate that weights leave. Then in
    # games of 20 steps in which the policy strays, so that many of a guided win's steps are useless.
    "mean_one": Part("--weight-mean one", "internalize"),
    "uniform_small": Part("--variant no_advantage --lambda-max {mean}", "internalize"),
    "response": Part("--distill-tokens response", "internalize"),
    "a_max_1": Part("--a-max 1", "internalize"),
    "stray": Part("--keep-phases --temperature 1.7 --max-steps 20"),
    "stray_no_advantage": Part("--variant no_advantage", "internalize", "stray"),
    "stray_mean_one": Part("--weight-mean one", "internalize", "stray"),
    "stray_uniform_small": Part("--variant no_advantage --lambda-max {mean}", "internalize", "stray"),
    "untrained": Part("--variant no_warmup --warmup-max 0 --mining-max 3 --distill-max 0 --panel 1 --no-base-eval --lr 1e-30"),
}
PUZZLE = ("mean_one", "uniform_small", "response", "a_max_1",
          "stray", "stray_no_advantage", "stray_mean_one", "stray_uniform_small")
COST = {"": 1.0, "before mining": 0.6, "mining": 0.75, "internalize": 0.4, "end": 0.3}       # of a whole run, about
WORLDS = {"alfworld": 5, "webshop": 3}          # seeds that are reported, from 0 on


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

    def of(self, variant: str) -> Cell:
        """The cell of another variant in the same world."""
        return self._replace(variant=variant)

    def needs(self) -> list[Cell]:
        """Cells that have to be done first."""
        part = PLAN[self.variant]
        wanted = {part.of} if part.at else set()
        wanted |= {"siri"} if re.search("{(steps|tokens|mined)}", part.flags) else set()
        wanted |= {"untrained"} if "{untrained}" in part.flags else set()
        return [self.of(variant) for variant in sorted(wanted)]

    @classmethod
    def read(cls, text: str) -> Cell:
        """UserError if there is no such cell."""
        world, _, rest = text.partition("/")
        variant, _, seed = rest.partition("/")
        if world not in WORLDS or variant not in PLAN or not seed.isdecimal():
            raise UserError(f"{text}: is no cell of the grid; give WORLD/VARIANT/SEED, as alfworld/no_gate/3")
        return cls(world, variant, int(seed))


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
    """The study's folder: `runs/` with a run for each cell, and the cells that are done, each with what its run has said. UserError
    for a folder that holds another study."""

    def __init__(self, folder: Path, preset: str) -> None:
        self.folder, self.file, on = folder, folder / "study.json", machine()
        self.data: dict[str, Any] = dict(
            preset=preset, settings={world: PRESETS[preset][world] for world in WORLDS}, code=fingerprint(),
            versions=on["versions"], commit=re.sub(r"^(\w{7})\w*", r"\1", on["commit"] or "unknown"), begun=on["date"][:10],
            device=f"{on['processor']}, {on['cores']} cores", cells={})
        if self.file.exists():
            now, self.data = self.data, evidence.read(self.file)
            there = {Cell.read(cell) for cell in self.data["cells"]}
            other = [name for name in ("preset", "code", "versions") if now[name] != self.data[name]]
            other += [f"preset of {w}" for w in {cell.world for cell in there} if now["settings"][w] != self.data["settings"][w]]
            other += [f"plan of {cell}" for cell in there if self.data["cells"][str(cell)]["plan"] != PLAN[cell.variant].flags]
            if other:
                raise UserError(f"{self.file}: is of another {other[0]}; a study is of one: give another --folder, or go on with "
                                f"what it was begun with (commit {self.data['commit']})")
            self.data |= {name: now[name] for name in ("settings", "commit")}       # which give the same cells, as was seen above

    def save(self) -> None:
        """Write the file, a line for each cell."""
        write_text(self.file, evidence.text(self.data))

    def run(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.folder / "runs" / cell.name

    def command(self, cell: Cell) -> list[str]:
        """Begin a cell, or go on with it. Its copy is made here. UserError if it can't be made."""
        part, folder = PLAN[cell.variant], self.run(cell)
        if part.at and not any(not damage(path) for path in checkpoints(folder)):
            branch(self.run(cell.of(part.of)), part.at, folder)
        flags = shlex.split(part.flags.format(**self.found(cell)))
        if checkpoints(folder):
            flags = ["--resume", str(folder), *flags, *["--no-keep-phases"] * bool(part.at)]
        else:
            flags = ["--env", cell.world, "--preset", self.data["preset"], "--seed", str(cell.seed), "--name", cell.name, *flags]
        return [sys.executable, str(ROOT / "siri.py"), *flags]

    def found(self, cell: Cell) -> dict[str, Any]:
        """What flags are filled in with."""
        part, said = PLAN[cell.variant], dict[str, Any]()
        if siri := self.data["cells"].get(str(cell.of("siri"))):
            phase, steps, tokens = (siri["rows"][name] for name in ("phase", "env_steps", "train_tokens"))
            said = dict(steps=steps[-1], tokens=tokens[-1], mined=sum(p < 2 for p in phase))
        for name, write in (("oracle", oracle_bank), ("untrained", self.untrained_bank)):
            if f"{{{name}}}" in part.flags:
                said[name] = self.folder / f"{cell.world}-{name}-seed{cell.seed}.txt"
                write_text(said[name], "\n".join(write(cell)) + "\n")
        if "{mean}" in part.flags:
            said["mean"] = mean_lambda(self.run(cell.of(part.of)))
        return said

    def untrained_bank(self, cell: Cell) -> list[str]:
        """Skills that a policy wrote whose weights had not moved."""
        return [skill["text"] for skill in self.data["cells"][str(cell.of("untrained"))]["bank"]]

    def start(self, cell: Cell) -> subprocess.Popen:
        """Run a cell, on one thread, its lines in a log beside its run. UserError and OSError if it can't be begun."""
        if fingerprint() != self.data["code"]:
            raise UserError("the code has changed since the study began; stop it, and begin again with one code")
        self.run(cell).parent.mkdir(exist_ok=True)
        command = self.command(cell)
        with self.run(cell).with_suffix(".log").open("a") as out:
            process = subprocess.Popen(command, cwd=self.folder, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                       start_new_session=True, env=os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"))
        write_text(self.run(cell).with_suffix(".pid"), str(process.pid))
        return process

    def outlived(self, cell: Cell) -> bool:
        """Whether a process still has the cell's run, from a study that was killed."""
        try:
            process = psutil.Process(int(self.run(cell).with_suffix(".pid").read_text()))
            return any(cell.name in word for word in process.cmdline())
        except (OSError, ValueError, psutil.Error):
            return False


def oracle_bank(cell: Cell) -> list[str]:
    """A truthful bank, written from the world's own habits: no policy could mine a better one."""
    if cell.world == "webshop":
        return [shop_skill(quality, brand) for quality, brand in envs.shop_habits(random.Random(f"shop/{cell.seed}")).items()]
    return [skill_text(thing.lower(), place.lower()) for thing, place in envs.Household(cell.seed).habit.items()]


def gated_rows(run: Path) -> list[siri.Row]:
    """The steps that a run would distil, with their weights (S7, S8), as it was when its phase 2 began. It has kept its phases."""
    cfg, checkpoint = load_config(run, {}), phase_ends(run)[2][0]
    steps = [siri.GuidedStep(**step) for part in read_json(checkpoint / "progress.json")["guided"] for step in part]
    return [row for row in siri.internalization_rows(steps, load_bank(checkpoint), cfg) if any(row.gate)]


def mean_lambda(run: Path) -> str:
    """Lambda times the mean weight of the gated tokens that a run had when its phase 2 began."""
    rows = gated_rows(run)
    gated = sum(sum(row.gate) for row in rows)
    return f"{load_config(run, {}).lambda_max * sum(row.weight * sum(row.gate) for row in rows) / max(gated, 1):.4f}"


def branch(source: Path, at: str, target: Path) -> None:
    """A copy of a run as it was: "before mining" at the end of warm-up, "mining" and "internalize" when these began, "end" whole.
    siri.py cuts the table of metrics to where the checkpoint is, and the evaluations are cut here. UserError without such a
    checkpoint."""
    ends, aside = phase_ends(source), target.with_name(target.name + ".aside")
    ended, last = {"before mining": (0, 1), "mining": (1, 0), "internalize": (2, 0), "end": (max(ends, default=0), 1)}[at]
    if ended not in ends:
        raise UserError(f"{source}: has no checkpoint of {at}; take it away, and its line out of study.json, and it is run again")
    checkpoint = ends[ended][last]
    for folder in (target, aside):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, aside / "checkpoints" / checkpoint.name)
    for name in ("config.json", "metrics.csv"):
        shutil.copy(source / name, aside / name)
    iteration = int(checkpoint.name.split("-")[0])
    write_json(aside / "results.json", [r for r in load_results(source) if r["iteration"] <= iteration
                                        and (r["label"] != "final" or at == "end")])
    os.replace(aside, target)


COLUMNS = ("phase", "env_steps", "train_tokens", "seconds", "optimizer_steps", "success_plain", "n_plain", "success_skill",
           "n_skill", "failed_groups", "kl", "invalid_rate", "detour", "internal_rows", "skills_candidate", "skills_active",
           "skills_retired")


def told(folder: Path, plan: str) -> dict[str, Any]:
    """What a run that has ended says: evaluations game by game, which games an active skill is for, a column for each metric, its
    bank, and, of a run that kept its phases, how many of the steps that pass the gate weigh nothing when phase 2 begins. UserError
    if games of an evaluation were lost to the machine or the environment, or a number is not finite: that is no result."""
    cfg, results, rows = load_config(folder, {}), load_results(folder), read_metrics(folder / "metrics.csv")[0]
    if lost := sum(r.get("failures", 0) for r in results):
        raise UserError(f"{folder}: {lost} games of its evaluations were lost; take the folder away, and it is run again")
    tokens, bank = 0.0, load_bank(folder)
    gated = gated_rows(folder) if cfg.keep_phases and 2 in phase_ends(folder) else []
    for row in rows:
        row["train_tokens"] = tokens = tokens + row["row_tokens"]
    cell = dict(
        plan=plan, evaluation_s=round(sum(r["seconds"] for r in results), 1), peak_gib=max(row["peak_gib"] for row in rows),
        evaluations=[dict(label=r["label"], iteration=r["iteration"], panel=r["panel"], env_steps=r.get("env_steps", 0),
                          won="".join("01"[won] for won in r["outcomes"].values()), invalid_rate=round(r["invalid_rate"], 4),
                          mean_steps=round(r["mean_steps"], 4), **({"score": round(r["score"], 4)} if "score" in r else {}))
                     for r in results],
        covered="".join("01"[bank.retrieve(task.goal, explore=False) is not None]
                        for task in siri.panel_tasks(cfg, make_environment(cfg))),
        rows={name: [tidy(row[name]) for row in rows] for name in COLUMNS},
        bank=[dict(text=skill.text, state=skill.state, born=skill.born, n=skill.n, utility=round(bank.utility(skill), 4),
                   effects=[[i, round(delta, 4)] for i, delta in skill.effects]) for skill in bank.skills],
        **({"weight_0": round(sum(not row.weight for row in gated) / len(gated), 4)} if gated else {}))
    if problem := misfit(cell, evidence.CELL, folder.name):
        raise UserError(f"{problem}; its run is in {folder}")
    return cell


def tidy(x: float) -> float | None:
    """A number as the file has it: whole numbers whole, others to four digits, none for nan."""
    return None if x != x else round(x, 4) if x % 1 else int(x) if abs(x) < 1e15 else x


# ---- 3. The loop ---------------------------------------------------------------------------------------------


class Stop(Exception):
    """A signal came."""


def raise_stop(number: int, frame: Any) -> None:
    """The handler of signals."""
    raise Stop


class Work:
    """The cells that are not done, `jobs` at a time."""

    def __init__(self, study: Study, cells: Sequence[Cell], jobs: int) -> None:
        self.study, self.jobs, self.done = study, jobs, study.data["cells"]
        self.waiting = [cell for cell in cells if str(cell) not in self.done]
        self.running: dict[Cell, tuple[subprocess.Popen, float]] = {}
        self.failed: list[Cell] = []
        self.fresh: list[tuple[Cell, float]] = []               # cells that have ended by now, and the seconds that they took

    def go(self) -> list[Cell]:
        """Run them all. Returns those that failed or could not be begun. Whatever ends this, the runs save and end first."""
        shown = time.monotonic()
        try:
            while self.waiting or self.running:
                self.begin()
                time.sleep(0.5)
                for cell in [cell for cell, (process, _) in self.running.items() if process.poll() is not None]:
                    self.end(cell)
                    shown = time.monotonic()
                if time.monotonic() - shown > EVERY:
                    shown = time.monotonic()
                    busy = [f"{cell} ({iterations(self.study.run(cell))} iterations)" for cell in [*self.running, *self.alive()]]
                    say(f"     running {', '.join(busy)}; {self.outlook()}")
        finally:
            for process, _ in self.running.values():
                process.send_signal(signal.SIGTERM)             # saved, as every run is
            for process, _ in self.running.values():
                process.wait()
        return self.failed

    def alive(self) -> list[Cell]:
        """Cells that a process of a killed study is still at: they are left to it, and take its place."""
        return [cell for cell in self.waiting if self.study.outlived(cell)]

    def begin(self) -> None:
        """Start what can be started."""
        alive = self.alive()
        for cell in [*self.waiting]:
            if any(need in self.failed for need in cell.needs()):
                self.fail(cell, "what it needs is missing")
            elif (cell not in alive and len(self.running) + len(alive) < self.jobs
                  and all(str(need) in self.done for need in cell.needs())):
                try:
                    self.running[cell] = self.study.start(cell), time.monotonic()
                    self.waiting.remove(cell)
                except (UserError, OSError) as e:
                    self.fail(cell, str(e))

    def end(self, cell: Cell) -> None:
        """A run has ended: its cell is done, or has failed."""
        process, began = self.running.pop(cell)
        if process.returncode:
            lines = self.study.run(cell).with_suffix(".log").read_text(errors="replace").splitlines()
            return self.fail(cell, f"its run ended with {process.returncode}: {lines[-1][:200] if lines else ''}")
        try:
            self.done[str(cell)] = said = told(self.study.run(cell), PLAN[cell.variant].flags)
        except (UserError, OSError) as e:
            return self.fail(cell, str(e))
        self.study.save()
        self.fresh.append((cell, time.monotonic() - began))
        last = "".join(f"{e['label']} {evidence.success(e):.3f}" for e in said["evaluations"][-1:])
        say(f"{len(self.done):4d} done  {cell}  {last}  {clock(self.fresh[-1][1])}  {self.outlook()}")

    def fail(self, cell: Cell, why: str) -> None:
        """A cell can't be had."""
        self.failed.append(cell)
        self.waiting = [other for other in self.waiting if other != cell]
        say(f"siri: {cell}: {why}", sys.stderr)

    def outlook(self) -> str:
        """What is left and how long it may take, by what cells have taken so far."""
        cost = lambda cell: COST[PLAN[cell.variant].at]
        left = f"{len(self.waiting) + len(self.running)} left"
        if not self.fresh:
            return left
        unit, now = sum(took for _, took in self.fresh) / sum(cost(cell) for cell, _ in self.fresh), time.monotonic()
        seconds = sum(map(cost, self.waiting)) * unit
        seconds += sum(max(cost(cell) * unit - (now - began), 0) for cell, (_, began) in self.running.items())
        return f"{left}, eta {clock(seconds / self.jobs)}"


def iterations(folder: Path) -> int:
    """How many a run has done."""
    table = folder / "metrics.csv"
    return max(len(table.read_bytes().splitlines()) - 1, 0) if table.exists() else 0


def fingerprint() -> str:
    """Of the code and the weights that decide a result."""
    digest = hashlib.sha256()
    for name in CODE:
        path = ROOT / name
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def repeat(study: Study, cell: Cell) -> bool:
    """Run a cell, and what it needs, again in a new folder. Returns whether all but times is the same. UserError for a cell that
    the study does not have, and if it can't be run."""
    if str(cell) not in study.data["cells"]:
        raise UserError(f"{cell}: is not done; {study.file} has {len(study.data['cells'])} cells")
    shutil.rmtree(study.folder / "repeat", ignore_errors=True)
    again = Study(study.folder / "repeat", study.data["preset"])
    again.folder.mkdir()
    if Work(again, grid([cell.world], [cell.variant], [cell.seed]), 1).go():
        raise UserError(f"{cell}: could not be repeated; its log is in {again.folder / 'runs'}")
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
        m = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not m or int(m[2] or m[1]) < int(m[1]):
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
    parser.add_argument("--write", action="store_true", help="the folder's study becomes assets/study.json, its tables and figures")
    parser.add_argument("--check", action="store_true", help="compare the tables with assets/study.json")
    chosen = parser.parse_args(argv)
    if chosen.jobs < 1:
        raise UserError(f"--jobs {chosen.jobs}: must be at least 1")
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
        folder = chosen.folder.resolve()
        if chosen.check or chosen.write:
            return evidence.command(chosen.write, folder / "study.json")
        from run import Lock  # not above: it would take a --check of this program for its own
        cells = grid(names_of(chosen.worlds, [*WORLDS], "--worlds"), names_of(chosen.variants, [*PLAN], "--variants"),
                     seeds_of(chosen.seeds) if chosen.seeds else None)
        again = Cell.read(chosen.repeat) if chosen.repeat else None
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, raise_stop)
        folder.mkdir(parents=True, exist_ok=True)
        with closing(Lock(folder)):
            study = Study(folder, chosen.preset)
            if again:
                same = repeat(study, again)
                say(f"{again}: {'the same' if same else 'NOT the same'}, game by game and iteration by iteration")
                return 0 if same else 1
            say(f"{len(cells)} cells, of which {sum(str(cell) in study.data['cells'] for cell in cells)} are done; {study.file}")
            failed = Work(study, cells, chosen.jobs).go()
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
