"""What the study says: its file, the statistics, and the tables and figures that README and docs show. `tools/study.py` runs it.

The unit is the run. Games of one seed share a household or a shop, and those of one policy its luck, so games do not count as
independent: on each seed two variants play the same panel with the same dice, and the differences d_1..d_n of their success on n
seeds are what an interval is made of:

    mean d +- t(.975; n - 1) sd(d) / sqrt(n),     p = P(|T| >= |mean d| sqrt(n) / sd(d)),  T of n - 1 degrees of freedom

sd has in it both the luck of runs and that of games. Intervals are of each line by itself; the p values of a table are corrected
after Holm for their number. `missed` is the difference that a test at 5%, uncorrected, finds in four of five studies: smaller ones
may be there and not be seen.

>>> estimate = across_seeds([0.10, 0.20, 0.15, 0.25, 0.20])
>>> f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}] p {estimate.p:.4f}"
'0.180 [0.109, 0.251] p 0.0021'
>>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
[0.03, 0.06, 0.06]
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import skills
from policy import UserError
from skills import COUNT, NUMBER, TEXT, Form, Optional
from tools.files import read_json, write_text
from tools.metrics import result_line, wilson
from tools.terminal import say

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "assets" / "study.json"
PAGES = ("README.md", "docs/results.md", "docs/evidence.md")
NAMES = dict(alfworld="household", webshop="shop")
LABELS = ("base", "after warm-up", "phase 1 plain", "phase 1 with skills", "final")
SHOWN = {"base": "base", "after warm-up": "after warm-up", "phase 1 plain": "phase 1, plain",
         "phase 1 with skills": "phase 1, with the bank", "final": "**final, bank thrown away**"}
MEANING = {
    "siri": "the whole method",
    "gigpo": "no skills, as many environment steps",
    "gigpo_compute": "no skills, as many trained tokens",
    "no_advantage": "S8: all gated steps alike",
    "no_gate": "S7: skills of every utility distilled",
    "no_pair_gain": "S7: the gate asks for the skill's utility alone",
    "distill_plain": "own plain wins distilled, no skill anywhere",
    "random_skill": "S3: any skill for any task",
    "no_validation": "S4-S6: every mined skill used and distilled",
    "ema": "S5: utility a moving average, b = .2",
    "oracle_skill": "a truthful bank instead of a mined one",
    "no_mining": "skills of a policy that had learnt nothing",
    "no_warmup": "phase 0 left out"}

FORMS = {"no_advantage": "all 1, so larger in the mean", "uniform_small": "all alike, at the paper's mean",
         "mean_one": "the paper's, mean 1"}
PUZZLE = {"siri": FORMS | {"a_max_1": "A_max 1 instead of 2", "response": "whole responses, not actions"},
          "stray": {f"stray_{name}": form for name, form in FORMS.items()}}
GAMES_OF = {"siri": "as ever", "stray": "longer, and the policy strays"}

# ---- 1. The file -----------------------------------------------------------------------------------------------------

GAMES = Form(lambda x: isinstance(x, str) and bool(x) and set(x) <= {"0", "1"}, "a 0 or 1 for each game")
COLUMN = Form(lambda x: isinstance(x, list) and all(v is None or NUMBER.holds(v) for v in x), "numbers or nulls")
EVALUATION = {"label": TEXT, "iteration": COUNT, "panel": TEXT, "env_steps": COUNT, "won": GAMES, "invalid_rate": NUMBER,
              "mean_steps": NUMBER, "score": Optional(NUMBER)}
SKILL = {"text": TEXT, "state": TEXT, "born": COUNT, "n": COUNT, "utility": NUMBER, "effects": [skills.EFFECT]}
CELL = {"plan": TEXT, "evaluations": [EVALUATION], "covered": GAMES, "rows": {...: COLUMN}, "bank": [SKILL], "peak_gib": NUMBER,
        "evaluation_s": NUMBER, "weight_0": Optional(NUMBER)}
STUDY = {"preset": TEXT, "settings": {...: {...: skills.ANYTHING}}, "code": TEXT, "commit": TEXT,
         "begun": TEXT, "device": TEXT, "versions": {...: TEXT}, "cells": {...: CELL}}


def read(path: Path) -> dict[str, Any]:
    """A study's file. UserError if it is none."""
    if not path.exists():
        raise UserError(f"{path}: is not there; run python tools/study.py")
    return read_json(path, STUDY)


def text(data: dict[str, Any]) -> str:
    """The file: JSON, a line for each cell."""
    compact = lambda value: json.dumps(value, separators=(",", ":"))
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in data.items() if k != "cells")
    cells = ",\n".join(f"  {json.dumps(k)}: {compact(v)}" for k, v in data["cells"].items())
    return f'{{\n{head} "cells": {{\n{cells}\n }}\n}}\n'


def success(evaluation: dict[str, Any]) -> float:
    """The share of an evaluation's games that were won."""
    return evaluation["won"].count("1") / len(evaluation["won"])


class Study:
    """Questions to the file."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data, self.cells = data, data["cells"]

    def seeds(self, world: str, *variants: str) -> list[int]:
        """On which all of these variants were run."""
        found = [{int(key.split("/")[2]) for key in self.cells if key.startswith(f"{world}/{variant}/")} for variant in variants]
        return sorted(set.intersection(*found))

    def cell(self, world: str, variant: str, seed: int) -> dict[str, Any]:
        """What a run said."""
        return self.cells[f"{world}/{variant}/{seed}"]

    def won(self, world: str, variant: str, seed: int, label: str = "final") -> np.ndarray:
        """Game by game, in the panel's order: 1 or 0, shape (games,)."""
        last = [e for e in self.cell(world, variant, seed)["evaluations"] if e["label"] == label][-1]
        return np.array([*map(int, last["won"])])

    def rate(self, world: str, variant: str, seed: int, label: str = "final") -> float:
        """Success on the panel; nan if the run did not play it."""
        played = any(e["label"] == label for e in self.cell(world, variant, seed)["evaluations"])
        return float(self.won(world, variant, seed, label).mean()) if played else math.nan

    def used(self, world: str, variant: str, seed: int, what: str) -> float:
        """Environment steps, trained tokens or seconds of the whole run."""
        return self.cell(world, variant, seed)["rows"][what][-1]

    def differences(self, world: str, variant: str, other: str, label: str = "final", than: str = "final") -> list[float]:
        """Success of `variant` minus that of `other`, a number for each seed."""
        return [self.rate(world, variant, s, label) - self.rate(world, other, s, than) for s in self.seeds(world, variant, other)]

    def pairs(self, world: str, seed: int) -> list[float]:
        """S4: every paired effect of phase 1."""
        cell = self.cell(world, "siri", seed)
        phase = cell["rows"]["phase"]
        return [delta for skill in cell["bank"] for i, delta in skill["effects"] if phase[i] == 1]


# ---- 2. Statistics ---------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over n seeds with its 95% interval, the two-sided p value of 0, and what the test may have missed."""
    mean: float
    low: float
    high: float
    p: float
    missed: float
    n: int


def two_sided(t: float, df: int) -> float:
    """P(|T| >= |t|) of Student's t with df degrees of freedom, by Simpson's rule on the density, to six digits."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    x = np.linspace(0, min(abs(t), 1e3), 20_001)
    density = scale * (1 + x * x / df) ** (-(df + 1) / 2)
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return max(0.0, 1 - 2 * float((weights * density).sum() * (x[1] - x[0]) / 3))


def quantile(p: float, df: int) -> float:
    """Where Student's t is below with probability p, p > 1/2, by bisection."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - two_sided(middle, df) / 2 < p else (low, middle)
    return low


def across_seeds(values: Sequence[float]) -> Estimate:
    """The estimate of the module's docstring. From one seed, or from values that are all the same, there is no interval (nan)."""
    n, mean = len(values), float(np.mean(values)) if values else math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    if not error:
        return Estimate(mean, math.nan, math.nan, math.nan, math.nan, n)
    half = quantile(0.975, n - 1) * error
    missed = half + quantile(0.8, n - 1) * error
    return Estimate(mean, mean - half, mean + half, two_sided(mean / error, n - 1), missed, n)


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number; those that are nan stay so, and do not count."""
    order = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    out, worst = [math.nan] * len(ps), 0.0
    for rank, (p, i) in enumerate(order):
        worst = max(worst, min(1.0, p * (len(order) - rank)))
        out[i] = worst
    return out


# ---- 3. Tables -------------------------------------------------------------------------------------------------------


def share(x: float) -> str:
    """A rate, as .742."""
    return "" if math.isnan(x) else f"{x:.3f}".replace("0.", ".", 1) if x < 1 else f"{x:.3f}"


def points(x: float) -> str:
    """A difference of rates in points, as +12.5."""
    return "" if math.isnan(x) else f"{100 * x:+.1f}"


def interval(e: Estimate) -> str:
    """A difference with its interval, in points."""
    return points(e.mean) + ("" if math.isnan(e.low) else f" [{points(e.low)}, {points(e.high)}]")


def probability(p: float) -> str:
    """A p value."""
    return "" if math.isnan(p) else "< .001" if p < 0.001 else share(p)


def rows_text(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, its first column text and the others numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def stages(study: Study, world: str) -> Iterator[tuple[str, list[float]]]:
    """Success at each evaluation of siri and at the end of both baselines, on each seed of siri; nan where it is not run yet."""
    for name, variant, label in [(SHOWN[label], "siri", label) for label in LABELS] + [
            (f"`{variant}`: {MEANING[variant]}", variant, "final") for variant in ("gigpo", "gigpo_compute")]:
        there = study.seeds(world, variant) if study.seeds(world, "siri", variant) else []
        yield name, [study.rate(world, variant, s, label) if s in there else math.nan for s in study.seeds(world, "siri")]


def short_table(study: Study) -> str:
    """The stages, a column for each world: the mean over seeds, and their range."""
    worlds = [w for w in NAMES if study.seeds(w, "siri")]
    cell = lambda rates: "" if any(map(math.isnan, rates)) else (
        f"{share(float(np.mean(rates)))} [{share(min(rates))}, {share(max(rates))}]")
    columns = [[cell(rates) for _, rates in stages(study, world)] for world in worlds]
    names = [name for name, _ in stages(study, worlds[0])]
    return rows_text(["mean [lowest, highest seed]", *(f"{NAMES[w]}, {len(study.seeds(w, 'siri'))} seeds" for w in worlds)],
                     zip(names, *columns))


def seeds_table(study: Study, world: str) -> str:
    """The stages, a column for each seed, and the mean, which is empty until all are there."""
    seeds = study.seeds(world, "siri")
    rows = [[name, *map(share, rates), share(float(np.mean(rates)))] for name, rates in stages(study, world)]
    n = len(study.won(world, "siri", seeds[0]))
    return rows_text([f"{NAMES[world]}, {n} games", f"seed {seeds[0]}", *map(str, seeds[1:]), "mean"], rows)


def variants_table(study: Study, world: str) -> str:
    """Every variant with its bank and at its end, and against siri on the same seeds."""
    there = [v for v in MEANING if study.seeds(world, "siri", v)]
    compared = [across_seeds(study.differences(world, v, "siri")) for v in there if v != "siri"]
    corrected, rows = iter(zip(compared, holm([e.p for e in compared]))), []
    for v in there:
        seeds = study.seeds(world, "siri", v)
        mean = lambda what: float(np.mean([study.used(world, v, s, what) for s in seeds]))
        rate = lambda label: share(float(np.mean([study.rate(world, v, s, label) for s in seeds])))
        e, p = next(corrected) if v != "siri" else (across_seeds([]), math.nan)
        rows.append([f"`{v}`: {MEANING[v]}", str(len(seeds)), rate("phase 1 with skills"), rate("final"), interval(e),
                     probability(p), "" if math.isnan(e.missed) else f"{100 * e.missed:.0f}",
                     f"{mean('env_steps'):,.0f}", f"{mean('train_tokens') / 1e6:.1f}", f"{mean('seconds') / 60:.0f}"])
    return rows_text(["variant", "seeds", "phase 1, with the bank", "final", "minus `siri`, points [95%]", "p, Holm", "may miss",
                      "environment steps", "million tokens trained", "minutes"], rows)


def claims(study: Study) -> list[tuple[str, str, Estimate]]:
    """What the study is asked, in each world: world, question, estimate over its seeds."""
    found = []
    for world in NAMES:
        if not (seeds := study.seeds(world, "siri")):
            continue
        found += [(world, "warm-up lifts", across_seeds(study.differences(world, "siri", "siri", "after warm-up", "base"))),
                  (world, "in phase 1 the half with the skill beats the half without",
                   across_seeds([float(np.mean(study.pairs(world, s))) for s in seeds if study.pairs(world, s)])),
                  (world, "the final policy against the one that had the bank",
                   across_seeds(study.differences(world, "siri", "siri", "final", "phase 1 with skills")))]
        found += [(world, f"`siri` against {name}", across_seeds([-d for d in study.differences(world, v, "siri")]))
                  for v, name in (("gigpo", "GiGPO at equal environment steps"), ("gigpo_compute", "GiGPO at equal trained tokens"))
                  if study.seeds(world, "siri", v)]
    return found


def claims_table(study: Study) -> str:
    """The claims with their estimates."""
    found = claims(study)
    return rows_text(["claim", "world", "seeds", "points [95%]", "p, Holm"],
                     [[what, NAMES[world], str(e.n), interval(e), probability(p)]
                      for (world, what, e), p in zip(found, holm([e.p for _, _, e in found]))])


def covered_table(study: Study, world: str) -> str:
    """Where the bank's worth stays and where it goes: siri's panels of all seeds, games that an active skill is for and others."""
    seeds, rows = study.seeds(world, "siri"), []
    covered = np.concatenate([[*map(int, study.cell(world, "siri", s)["covered"])] for s in seeds])
    for name, part in (("an active skill is for them", covered == 1), ("none is", covered == 0)):
        wins = [np.concatenate([study.won(world, "siri", s, label) for s in seeds])[part] for label in LABELS]
        rows.append([name, str(part.sum()), *(share(float(w.mean())) if part.any() else "" for w in wins)])
    return rows_text([f"{NAMES[world]}: games", "n", *(SHOWN[label] for label in LABELS)], rows)


def truth_table(study: Study, world: str) -> str:
    """How many skills of all seeds are true, by their state at the end: the bank that was written from the world's own habits has
    them, too. Then the mean paired effect (S4) of true ones and of others. Empty where there is none."""
    rows = []
    for v in ("siri", "ema", "no_warmup", "no_mining", "random_skill", "no_validation"):
        counts, effects = {state: [0, 0] for state in STATES}, {True: list[float](), False: list[float]()}
        for seed in study.seeds(world, v, "oracle_skill"):
            truth = {skill["text"] for skill in study.cell(world, "oracle_skill", seed)["bank"]}
            for skill in study.cell(world, v, seed)["bank"]:
                true = skill["text"] in truth
                counts[skill["state"]][0] += true
                counts[skill["state"]][1] += 1
                effects[true] += [delta for _, delta in skill["effects"]]
        if any(n for _, n in counts.values()):
            rows.append([f"`{v}`: {MEANING[v]}", *(f"{true} of {n}" if n else "" for true, n in counts.values()),
                         *(f"{points(float(np.mean(deltas)))} ({len(deltas)})" if deltas else "" for deltas in effects.values())])
    return rows_text([f"{NAMES[world]}: true skills", *STATES, "effect of true ones, points (pairs)", "of others"], rows)


def puzzle(study: Study) -> list[tuple[str, str, Estimate]]:
    """The forms of the weights against the paper's, which each began from the same copies: variant of the paper's form, form,
    estimate of the difference."""
    return [(paper, form, across_seeds(study.differences("alfworld", variant, paper)))
            for paper, forms in PUZZLE.items() for variant, form in forms.items() if study.seeds("alfworld", paper, variant)]


def puzzle_table(study: Study) -> str:
    """Which steps, or how large a step: with the share of a guided win's steps that nobody needed, in phase 2, and that of the
    steps which pass the gate and to which the paper's weights give nothing, over seeds, when phase 2 begins."""
    found, rows = puzzle(study), []
    for (paper, form, e), p in zip(found, holm([e.p for *_, e in found])):
        cells = [study.cell("alfworld", paper, s) for s in study.seeds("alfworld", paper)]
        useless = np.mean([x for r in (cell["rows"] for cell in cells) for x, phase in zip(r["detour"], r["phase"])
                           if phase == 2 and x is not None])
        nothing = [cell["weight_0"] for cell in cells if "weight_0" in cell]
        left_out = f"{100 * min(nothing):.0f} to {100 * max(nothing):.0f}%" if nothing else ""
        rows.append([form, GAMES_OF[paper], f"{100 * useless:.0f}%", left_out, str(e.n), interval(e), probability(p)])
    return rows_text(["form of the weights", "games", "useless steps", "gated steps of weight 0", "seeds",
                      "minus the paper's, points [95%]", "p, Holm"], rows)


def cost_table(study: Study) -> str:
    """Time and memory of a whole run of siri with its five evaluations, a mean over seeds."""
    rows = []
    for world in NAMES:
        runs = [study.cell(world, "siri", s) for s in study.seeds(world, "siri")]
        mean = lambda of: float(np.mean([of(r) for r in runs]))
        last = lambda what: mean(lambda run: run["rows"][what][-1])
        rows += [[NAMES[world], f"{mean(lambda r: len(r['rows']['phase'])):.1f}", f"{last('env_steps'):,.0f}",
                  f"{last('train_tokens') / 1e6:.1f}", f"{last('seconds') / 60:.1f}",
                  f"{mean(lambda r: r['evaluation_s']) / 60:.1f}", f"{mean(lambda r: r['peak_gib']):.2f}"]] if runs else []
    return rows_text(["world", "iterations", "environment steps", "million tokens trained", "minutes of training",
                      "of evaluation", "peak memory, GiB"], rows)


def made_with(study: Study) -> str:
    """One line: of what the study is."""
    d, counts = study.data, [f"{NAMES[w]} {len(study.seeds(w, 'siri'))}" for w in NAMES]
    return (f"{len(study.cells)} runs of preset {d['preset']} at commit {d['commit']}, begun {d['begun']}; seeds: "
            f"{', '.join(counts)}; {d['device']}, one thread a run, two runs at a time; "
            f"{', '.join(f'{k} {v}' for k, v in d['versions'].items())}.")


def results_lines(study: Study) -> str:
    """The last lines of README's first command: the evaluations of the household's first seed."""
    if not study.seeds("alfworld", "siri"):
        return "(The household is not measured yet.)"
    said = study.cell("alfworld", "siri", study.seeds("alfworld", "siri")[0])["evaluations"]
    lines = [result_line(dict(e, n=(n := len(e["won"])), success=success(e), interval=wilson(e["won"].count("1"), n)), indent=2)
             for e in said]
    return "```\n" + "\n".join(lines) + "\n```"


def of(table: Callable[[Study, str], str], world: str) -> Callable[[Study], str]:
    """A table of one world; a line where the study has none of it yet."""
    return lambda study: table(study, world) if study.seeds(world, "siri") else f"(The {NAMES[world]} is not measured yet.)"


BLOCKS: dict[str, Callable[[Study], str]] = {
    "short": short_table, "household": of(seeds_table, "alfworld"), "shop": of(seeds_table, "webshop"),
    "household variants": of(variants_table, "alfworld"), "shop variants": of(variants_table, "webshop"),
    "household covered": of(covered_table, "alfworld"), "shop covered": of(covered_table, "webshop"),
    "household truth": of(truth_table, "alfworld"), "shop truth": of(truth_table, "webshop"),
    "puzzle": puzzle_table, "claims": claims_table, "cost": cost_table, "made with": made_with, "first run": results_lines}


# ---- 4. Figures ------------------------------------------------------------------------------------------------------

LINES = {"siri": dict(color="#1f4e96"), "gigpo": dict(color="0.35", ls="--"), "gigpo_compute": dict(color="0.6", ls=":"),
         "no_advantage": dict(color="#b5462f", ls="-.")}
STATES = dict(candidate=dict(color="0.45", ls="--"), active=dict(color="#1f4e96"), retired=dict(color="k", ls=":"))


def begins(rows: dict[str, list], phase: int) -> int:
    """The iteration in which a phase began; -1 if it did not."""
    return rows["phase"].index(phase) if phase in rows["phase"] else -1


def curves(study: Study, world: str, variant: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Success of plain training rollouts over `axis`, a mean of five iterations, at 100 places to where the shortest run ended:
    (100,) and (seeds, 100)."""
    runs = [study.cell(world, variant, s)["rows"] for s in study.seeds(world, "siri", variant)]
    at = np.linspace(0, min(r[axis][-1] for r in runs), 100)
    smooth = lambda y: np.array([np.nanmean(y[max(0, i - 2):i + 3]) for i in range(len(y))])
    return at, np.array([np.interp(at, r[axis], smooth(np.array(r["success_plain"], float))) for r in runs])


def curves_figure(study: Study) -> Any:
    """Success over environment steps and over seconds, in both worlds: mean and range over seeds, phases of siri marked, and the
    panel at the end."""
    from matplotlib.figure import Figure
    worlds = [w for w in NAMES if study.seeds(w, "siri")]
    figure = Figure(figsize=(10, 3.2 * len(worlds)), layout="constrained")
    axes = figure.subplots(len(worlds), 2, squeeze=False)
    for row, world in zip(axes, worlds):
        for ax, axis, unit in zip(row, ("env_steps", "seconds"), ("environment steps", "seconds of training, one thread")):
            for variant, style in LINES.items():
                if not (seeds := study.seeds(world, "siri", variant)):
                    continue
                at, y = curves(study, world, variant, axis)
                ax.plot(at, y.mean(axis=0), label=variant, lw=1.8, **style)
                ax.fill_between(at, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.12, lw=0)
                ends = [[study.used(world, variant, s, axis), study.rate(world, variant, s)] for s in seeds]
                ax.plot(*np.mean(ends, axis=0), "D", color=style["color"], ms=6, mec="k")
            rows = [study.cell(world, "siri", s)["rows"] for s in study.seeds(world, "siri")]
            for phase, name in ((1, "mining"), (2, "internalize")):
                begun = float(np.mean([r[axis][max(begins(r, phase) - 1, 0)] for r in rows]))
                ax.axvline(begun, color="0.4", lw=1, ls=":")
                ax.text(begun, 1.0, f" {name}", va="top", fontsize=8, color="0.25")
            ax.set(xlabel=unit, ylim=(0, 1), ylabel=f"success, {NAMES[world]}")
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.92))
    return figure


def bank_figure(study: Study) -> Any:
    """Skills by state over iterations of siri, mean over seeds."""
    from matplotlib.figure import Figure
    worlds = [w for w in NAMES if study.seeds(w, "siri")]
    figure = Figure(figsize=(5 * len(worlds), 2.8), layout="constrained")
    for ax, world in zip(figure.subplots(1, len(worlds), squeeze=False)[0], worlds):
        runs = [r for s in study.seeds(world, "siri") if begins(r := study.cell(world, "siri", s)["rows"], 1) >= 0]
        age = min(len(r["phase"]) - begins(r, 1) for r in runs)
        for state, style in STATES.items():
            y = np.array([r[f"skills_{state}"][begins(r, 1):][:age] for r in runs])
            ax.plot(range(age), y.mean(axis=0), label=state, **style)
            ax.fill_between(range(age), y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.12, lw=0)
        ax.set(xlabel="iterations since mining began", ylabel="skills", title=NAMES[world])
        ax.legend(frameon=False, fontsize=8)
    return figure


def puzzle_figure(study: Study) -> Any:
    """Each form of the weights minus the paper's, with its interval, in both kinds of games."""
    from matplotlib.figure import Figure
    found = puzzle(study)
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(found)), layout="constrained")
    ax = figure.subplots()
    for y, (paper, _, e) in enumerate(found):
        half = None if math.isnan(e.low) else 100 * (e.mean - e.low)
        ax.errorbar(100 * e.mean, y, xerr=half, capsize=3, fmt="o" if paper == "siri" else "s",
                    color="#1f4e96" if paper == "siri" else "#b5462f")
    ax.axvline(0, color="0.4", lw=1, ls=":")
    ax.set_yticks(range(len(found)), [f"{form}\n(games {GAMES_OF[paper]})" for paper, form, _ in found], fontsize=8)
    ax.set(ylim=(len(found) - 0.5, -0.5), xlabel="points above the paper's weights at the end, 95% over seeds")
    return figure


FIGURES = {"assets/curves.png": curves_figure, "assets/bank.png": bank_figure, "assets/weights.png": puzzle_figure}


# ---- 5. Pages --------------------------------------------------------------------------------------------------------


def filled(page: str, study: Study) -> str:
    """A page with the study's blocks made anew: what stands between <!-- study: NAME --> and <!-- end -->. UserError for another
    name than there is."""
    def block(m: re.Match) -> str:
        if m[1] not in BLOCKS:
            raise UserError(f"<!-- study: {m[1]} -->: must be one of {', '.join(BLOCKS)}")
        return f"<!-- study: {m[1]} -->\n{BLOCKS[m[1]](study)}\n<!-- end -->"

    return re.sub(r"<!-- study: ([\w ]+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def mark(data: dict[str, Any]) -> str:
    """What a figure has in it of the file that it was drawn from."""
    return f"study {hashlib.sha256(text(data).encode()).hexdigest()[:16]}"


def command(write: bool, found: Path | None = None) -> int:
    """Take a study that was found, if it is there, and write the pages' blocks and the figures; or compare the blocks, and of which
    file the figures were drawn. Returns the exit status. UserError as `read` and `filled`."""
    if write and found and found.exists():
        write_text(FILE, text(read(found)))
    study, wrong = Study(read(FILE)), 0
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        now = filled(page, study)
        if write:
            (ROOT / name).write_text(now, encoding="utf-8")
        elif now != page:
            wrong += 1
            changed = [*difflib.unified_diff(page.splitlines(), now.splitlines(), name, "the study", lineterm="", n=0)]
            say("\n".join(changed[:12]))
    for name, figure in FIGURES.items():
        if write:
            held = io.BytesIO()
            figure(study).savefig(held, dpi=130, metadata=dict(Software=None, Description=mark(study.data)))
            (ROOT / name).write_bytes(held.getvalue())
        elif mark(study.data).encode() not in (ROOT / name).read_bytes():
            wrong += 1
            say(f"{name} was drawn from another file")
    say(f"{len(study.cells)} runs; {len(PAGES)} pages and {len(FIGURES)} figures "
        f"{'written' if write else f'compared, {wrong} of them differ'}")
    return 1 if wrong else 0
