"""`python siri.py --report A B ...`: one page that compares runs, comparison.html beside the first. Of one run: its report.

Curves stand over environment steps and over seconds of training: what a run costs in games, and what in time. Evaluations of the
same games are paired. Of n games that two policies played, b were won by the first alone and c by the other alone; then

    difference = (c - b) / n, with the 95% interval of Newcombe (1998): two Wilson intervals, joined by the correlation phi
    p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2)                              McNemar's test, exact

>>> mcnemar(1, 7), mcnemar(0, 0)
(0.0703125, 1.0)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy import UserError
from tools.figures import Series, chart, esc, finite, number, table
from tools.files import read_json, refuse_links
from tools.metrics import wilson
from tools.report import CONFIG, document, final_result, rate, read_metrics, read_results, section, write, write_page
from tools.terminal import say

TITLE = "comparison of SIRI runs"
MOST = 8                # runs on a page: more lines cannot be told apart
CURVES = (              # column of metrics.csv, heading, what it is; what no run has is left out
    ("success_plain", "Success in training, plain prompt", "Share of the rollouts that reach the goal"),
    ("success_skill", "Success in training, with a skill", "Share of the rollouts that reach the goal"),
    ("score_plain", "Score in training, plain prompt", "Mean score of the rollouts, 0 to 1"),
    ("mean_steps", "Steps per episode", "Mean number of actions in a rollout"),
    ("invalid_rate", "Invalid steps", "Share of the steps that held no admissible action"),
    ("solved_tasks", "Solved tasks", "Distinct training tasks won with the plain prompt so far"),
    ("kl", "KL to the base model", "Nats per token, k3 estimate"),
    ("entropy", "Entropy", "Nats per token"))
AXES = (("env_steps", "environment step"), ("seconds", "second"))


# ---- 1. Paired tests -----------------------------------------------------------------------------------------


def mcnemar(b: int, c: int) -> float:
    """Two-sided exact p value of b against c discordant pairs; 1 for none."""
    return min(1.0, 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))


def paired_difference(both: int, b: int, c: int, neither: int) -> tuple[float, float, float]:
    """Success rate of the other policy minus that of the first, and its 95% interval (Newcombe's method 10, which corrects phi for
    continuity). `both` and `neither` count the games that both won and both lost. ValueError for no games."""
    n = both + b + c + neither
    if not n:
        raise ValueError("no games")
    p, q = (both + b) / n, (both + c) / n                                       # of the first, of the other
    (p_low, p_high), (q_low, q_high) = wilson(both + b, n), wilson(both + c, n)
    margins = (both + b) * (c + neither) * (both + c) * (b + neither)
    cross = both * neither - b * c
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / math.sqrt(margins) if margins else 0.0
    below = math.hypot(q - q_low, p_high - p) ** 2 - 2 * phi * (q - q_low) * (p_high - p)
    above = math.hypot(q_high - q, p - p_low) ** 2 - 2 * phi * (q_high - q) * (p - p_low)
    return q - p, q - p - math.sqrt(max(below, 0)), q - p + math.sqrt(max(above, 0))


# ---- 2. Files in ---------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What a run's folder says of it; `name` is HTML."""
    name: str
    cfg: dict[str, Any]
    rows: list[dict[str, float]]
    results: list[dict[str, Any]]

    def cost(self, iterations: float, axis: str) -> float:
        """Environment steps, or seconds, of training until so many iterations were done; nan if the run did not record them."""
        return next((r.get(axis, math.nan) for r in self.rows if r["iteration"] == iterations - 1),
                    math.nan) if iterations else 0.0


def tell(folder: Path, name: str) -> Told:
    """UserError as `report.page`."""
    refuse_links(folder)
    cfg = read_json(folder / "config.json", CONFIG)
    return Told(esc(name), cfg, read_metrics(folder / "metrics.csv")[0], read_results(folder / "results.json"))


# ---- 3. The sections of the page -----------------------------------------------------------------------------


def overview_section(runs: Sequence[Told]) -> str:
    """What the runs are, and how far they came."""
    rows = []
    for run in runs:
        final, last = final_result(run.rows, run.results), run.rows[-1] if run.rows else {}
        rows.append([run.name, esc(run.cfg["env"]), esc(run.cfg["preset"]), esc(run.cfg["variant"]), esc(run.cfg["seed"]),
                     str(len(run.rows)), number(last.get("env_steps", math.nan)), number(last.get("seconds", math.nan)),
                     esc(run.results[-1]["panel"] if run.results else ""),
                     f"{rate(final)}, n {final['n']}" if final else "not finished"])
    head = ["run", "environment", "preset", "variant", "seed", "iterations", "environment steps", "seconds", "panel",
            "final success [95%]"]
    return section("runs", "Runs", table("What was run, and how far it came", head, rows, 4))


def curves_section(runs: Sequence[Told]) -> str:
    """Every curve over environment steps, and beside it over seconds."""
    out: list[str] = []
    ends = [max([r[axis] for run in runs for r in run.rows if finite(r.get(axis, math.nan))], default=0.0) for axis, _ in AXES]

    def draw(title: str, what: str, points: Callable[[Told, str], list], y: tuple[float, float] | None, bars: bool) -> None:
        for (axis, unit), end in zip(AXES, ends):
            series = [Series(run.name, points(run, axis), bars=bars) for run in runs]
            out.append(chart(f"curve{len(out)}", f"{title}, by {unit}s", what, series, [], (0, end), y=y, unit=unit))

    def evaluated(run: Told, axis: str) -> list:
        return [(run.cost(r["iteration"], axis), r["successes"] / r["n"], *wilson(r["successes"], r["n"]))
                for r in run.results if r["n"] and not r["skills"] and finite(run.cost(r["iteration"], axis))]

    draw("Evaluations", "Success on each run's panel with the plain prompt; bars: 95% Wilson intervals", evaluated, (0, 1), True)
    for column, title, what in CURVES:
        if any(finite(r.get(column, math.nan)) for run in runs for r in run.rows):
            draw(title, what, lambda run, axis: [(r[axis], r.get(column, math.nan), math.nan, math.nan) for r in run.rows
                                                 if finite(r.get(axis, math.nan))],
                 (0, 1) if column.startswith(("success", "score", "invalid")) else None, False)
    return section("curves", "Curves", "<p>Environment steps and seconds are those of training, evaluations excluded; seconds "
                   f'depend on the machine.</p><div class="grid2">{"".join(out)}</div>')


def test_cells(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Games in common, won by either alone, difference and p; or why there is no test."""
    games = first["outcomes"].keys() & other["outcomes"].keys()
    if not games or first.get("notice") != other.get("notice"):
        return [f"other games ({esc(first['panel'])}; {esc(other['panel'])}): no paired test", *["&ndash;"] * 4]
    pairs = [(first["outcomes"][game], other["outcomes"][game]) for game in games]
    both, b, c, neither = map(pairs.count, ((True, True), (True, False), (False, True), (False, False)))
    difference, low, high = paired_difference(both, b, c, neither)
    most = max(len(first["outcomes"]), len(other["outcomes"]))
    settings = [r["settings"] if isinstance(r.get("settings"), dict) else {} for r in (first, other)]
    changed = [k for k in settings[0] if settings[0][k] != settings[1].get(k, settings[0][k])]
    remark = f" of {most}" * (most > len(games)) + f"; not the same {esc(', '.join(changed))}" * bool(changed)
    return [f"{len(games)}{remark}", str(b), str(c), f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]", number(mcnemar(b, c))]


def results_section(runs: Sequence[Told]) -> str:
    """Every evaluation of every run, and the tests against the first run."""
    entries = [{r["label"]: r for r in run.results} for run in runs]             # of several with a label, the last
    labels = list(dict.fromkeys(label for entry in entries for label in entry))
    if not labels:
        return section("results", "Evaluations", "<p>Nothing has been evaluated yet.</p>")
    name, cell = runs[0].name, lambda r: f"{rate(r)}<br><small>n {r['n']}</small>" if r else "&ndash;"
    rates = [[esc(label), *(cell(entry.get(label)) for entry in entries)] for label in labels]
    tests = [[esc(label), run.name, *test_cells(entries[0][label], entry[label])] for label in labels if label in entries[0]
             for run, entry in zip(runs[1:], entries[1:]) if label in entry]
    head = ["evaluation", "run", "games in common", f"only {name} won", "only the run won", "difference [95%]", "p"]
    tested = table(f"Each run against {name}, game by game", head, tests, 3) + (
        f"<p>The difference is the success of the run minus that of {name} on the games that both have played, with its 95% "
        "interval (Newcombe, paired). p is of McNemar's exact test: how likely games won by one of the two alone would fall at "
        "least so unevenly if both were equally good. It says nothing of other seeds, and is not corrected for the number of "
        f"tests ({len(tests)}).</p>")
    return section("results", "Evaluations",
                   table("Success with its 95% Wilson interval", ["evaluation", *(run.name for run in runs)], rates),
                   tested if tests else f"<p>No other run has an evaluation that {name} has: no paired test.</p>")


def settings_section(runs: Sequence[Told]) -> str:
    """The settings in which the runs differ."""
    names = [k for k in dict.fromkeys(k for run in runs for k in run.cfg) if k != "name"]
    show = lambda cfg, k: f"<code>{esc(cfg[k])}</code>" if cfg.get(k, "") != "" else "&ndash;"
    rows = [[esc(k), *(show(run.cfg, k) for run in runs)] for k in names
            if any(run.cfg.get(k) != runs[0].cfg.get(k) for run in runs)]
    return section("settings", "Settings", table("Settings that differ", ["setting", *(run.name for run in runs)], rows) if rows
                   else "", f"<p>{f'The other {len(names) - len(rows)}' if rows else f'All {len(names)}'} are the same.</p>")


# ---- 4. The page ---------------------------------------------------------------------------------------------


def page(folders: Sequence[Path]) -> str:
    """The whole page. UserError as `report.page`, and for a run given twice or more than `MOST`."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("--report: a run is given twice; give each once")
    if len(folders) > MOST:
        raise UserError(f"--report: {len(folders)} runs; give at most {MOST}, as more lines cannot be told apart")
    short = [folder.resolve().name for folder in folders]
    runs = [tell(folder, name if short.count(name) == 1 else str(folder)) for folder, name in zip(folders, short)]
    names = ", ".join(run.name for run in runs)
    notices = dict.fromkeys(str(r["notice"]) for run in runs for r in run.results if r.get("notice"))
    header = (f"<header><h1>Comparison of {names}</h1>\n" + "".join(f'<p class="notice">{esc(notice)}</p>\n' for notice in notices)
              + "</header>\n")
    links = dict(runs="Runs", results="Evaluations", curves="Curves", settings="Settings")
    return document(f"{names}: {TITLE}", links, header, "\n".join(
        part(runs) for part in (overview_section, results_section, curves_section, settings_section)))


def command(given: Sequence[str], settings: dict[str, Any]) -> None:
    """`--report`: write the report of a run, or the comparison of several, and say where it is. UserError as `page`, and for a
    file of that name that is not ours."""
    folders = [Path(name) for name in given]
    if len(folders) == 1:
        return say(write(folders[0]))
    path = folders[0].resolve().parent / "comparison.html"
    if os.path.lexists(path) and not (path.is_file() and TITLE in path.read_text(errors="replace")):
        raise UserError(f"{path}: is another file; move it away")
    say(write_page(path, page(folders)))
