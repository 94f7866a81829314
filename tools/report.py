"""The report of a run, runs/NAME/report.html: one page that needs no other. A run writes it anew at every sample and every
evaluation, and at its end; `python siri.py --report runs/NAME` does so at any time.

It shows what the files of the run folder say, and nothing that they don't: config.json, metrics.csv, results.json,
skills.json and samples/*.json. What a run does not have yet is named as missing; a file that siri.py did not write is a
UserError. The page loads nothing and runs no script. All text of a run (goals, pages, skills, what the policy wrote) goes
through `esc`. Charts and style are in `figures.py`.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import skills
from policy import UserError
from siri import PHASES, Config
from skills import ANYTHING, COUNT, FLAG, NUMBER, TEXT, Form, misfit
from tools.figures import STYLE, Life, Series, chart, esc, finite, folded, number, table, timeline
from tools.files import RESULTS, load_bank, read_json, refuse_links, write_text
from tools.metrics import wilson

FLOAT = Form(lambda x: type(x) is float or NUMBER.holds(x), "a number")        # nan where there was nothing to average
PIECES = Form(lambda x: isinstance(x, list) and all(map(TEXT.holds, x)), "a list of texts")            # of many: as a whole
WEIGHTS = Form(lambda x: isinstance(x, list) and all(map(FLOAT.holds, x)), "a list of numbers")
STEP = dict(observation=TEXT, text=TEXT, pieces=PIECES, weights=WEIGHTS, reward=FLOAT, advantage=FLOAT, valid=FLAG)
EPISODE = dict(skill=Form(lambda x: x is None or isinstance(x, str), "a text or null"), success=FLAG, steps=[STEP])
SAMPLE = dict(iteration=COUNT, phase=COUNT, task=TEXT, goal=TEXT, episodes=[EPISODE])
CONFIG = {"env": TEXT, "preset": TEXT, "variant": TEXT, "seed": COUNT, ...: ANYTHING}
COLUMNS = ("iteration", "phase", "success_plain", "n_plain", "success_skill", "n_skill")    # of every metrics.csv
CURVES = (      # column of metrics.csv, heading, what it is; an older run may lack some
    ("kl", "KL to the base model", "Nats per token, k3 estimate"),
    ("entropy", "Entropy", "Nats per token"),
    ("grad_norm", "Gradient norm", "Before clipping, mean over the optimizer steps"),
    ("clip_fraction", "Clipped tokens", "Share of tokens whose ratio left the clip range"),
    ("zero_signal_groups", "Groups without a signal", "Number of groups whose advantages are all zero"),
    ("mean_steps", "Steps per episode", "Mean number of actions in a rollout"),
    ("invalid_rate", "Invalid steps", "Share of the steps that held no admissible action"),
    ("solved_tasks", "Solved tasks", "Distinct training tasks won with the plain prompt so far"),
    ("rollout_tokens_per_s", "Rollout speed", "Sampled tokens per second"),
    ("update_tokens_per_s", "Update speed", "Prompt and response tokens through forward and backward, per second"))
SAMPLES_MIB = 8         # of sample files on the page at most: some thousands of steps, which a browser still shows at once
RELOAD_S = 60           # after so long the page of a live run loads itself anew
RELOAD = f"setTimeout(() => location.reload(), {1000 * RELOAD_S})"


# ---- 1. Files in ---------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict[str, Any]]:
    """The evaluations in results.json; none if it is missing. UserError for data that siri.py did not write."""
    results = read_json(path, RESULTS) if path.exists() else []
    for part in itertools.chain(results, *(r["kinds"].values() for r in results)):
        if not 0 <= part["successes"] <= part["n"]:
            raise UserError(f"{path}: {part['successes']} successes of {part['n']} games; move it away")
    return results


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples in the order of their file names: all, or every second, every third ... up to the last, where they would
    take more than `SAMPLES_MIB`. UserError for data that siri.py did not write."""
    samples, paths = [], sorted(folder.glob("*.json"))
    every = max(1, math.ceil(sum(path.stat().st_size for path in paths) / (SAMPLES_MIB * 2**20)))
    for path in paths[::-1][::every][::-1]:
        samples.append(read_json(path, SAMPLE))
        if samples[-1]["phase"] not in range(3) or any(
                len(s["pieces"]) != len(s["weights"]) for e in samples[-1]["episodes"] for s in e["steps"]):
            raise UserError(f"{path}: has an unknown phase, or tokens without a weight; move it away")
    return samples


def read_metrics(path: Path) -> tuple[list[dict[str, float]], str]:
    """The rows of metrics.csv, and a remark for the reader. A line that a crash tore is the last one: it has no end.
    UserError naming the column or line that is wrong."""
    if not path.exists():
        return [], "metrics.csv is missing: this run has not finished an iteration."
    try:
        text = path.read_bytes().decode()
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read as CSV ({e}); is this a run folder?") from e
    torn = bool(lines) and not text.endswith("\n")
    header, *lines = lines[:len(lines) - torn] or [[]]
    if missing := [c for c in COLUMNS if header and c not in header]:
        raise UserError(f"{path}: has no column {missing[0]}; it is not the metrics.csv of a run")
    rows = []
    for place, cells in enumerate(lines, 2):
        try:
            rows.append(dict(zip(header, map(float, cells), strict=True)))
            if rows[-1]["phase"] not in range(3) or not 0 <= rows[-1]["iteration"] < 1e9:
                raise ValueError("impossible phase or iteration")
        except ValueError as e:
            raise UserError(f"{path}: line {place} is not a row of metrics ({e}); mend or remove it") from e
    remark = "The last line of metrics.csv is torn (a crash, or it was being written) and is left out. " if torn else ""
    return rows, remark + ("" if rows else "metrics.csv has no whole row: this run has not finished an iteration.")


# ---- 2. The sections of the page -----------------------------------------------------------------------------


def section(name: str, heading: str, *parts: str) -> str:
    """A section of the page; `name` is its id, heading and parts are HTML."""
    return f'<section id="{name}"><h2>{heading}</h2>\n{"".join(parts)}</section>\n'


def rate(part: dict[str, Any]) -> str:
    """Success with its 95% Wilson interval, as HTML; a dash for n = 0."""
    lo, hi = wilson(part["successes"], part["n"])
    return f"{part['successes'] / part['n']:.3f} [{lo:.3f}, {hi:.3f}]" if part["n"] else "&ndash;"


def final_result(rows: list[dict], results: list[dict]) -> dict[str, Any] | None:
    """The evaluation that ended the run; None while it has not ended, or goes on as it was granted more iterations."""
    final = next((r for r in reversed(results) if r["label"] == "final"), None)
    return None if final and rows and final["iteration"] < len(rows) else final


def header_section(name: str, cfg: dict[str, Any], rows: list[dict], results: list[dict], alive: bool) -> str:
    """What the run is, how far it came, what it reached."""
    latest = results[-1] if results else {}
    notice = latest.get("notice") or ("A small generated world: its scores are not benchmark scores." if cfg.get("compact")
                                      else "The run did not record which data it played.")
    versions = latest.get("versions")
    final = final_result(rows, results)
    state = "finished" if final else "not finished: running, or stopped"
    if alive:
        state = f"alive, as of {time.strftime('%Y-%m-%d %H:%M:%S %Z')}; this page loads itself anew every {RELOAD_S} s"
    facts = dict(
        Environment=cfg["env"], Preset=cfg["preset"], Variant=cfg["variant"], Seed=cfg["seed"],
        Model=cfg.get("model", "not recorded"),
        Versions=", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "not recorded",
        State=state,
        Iterations=f"{len(rows)}, the last in {PHASES[int(rows[-1]['phase'])]}" if rows else "none yet")
    if rows and {"env_steps", "seconds"} <= set(rows[-1]):
        facts["Training"] = f"{rows[-1]['env_steps']:,.0f} environment steps, {rows[-1]['seconds'] / 60:.1f} min"
    listed = "".join(f"<div><dt>{k}</dt><dd>{esc(v)}</dd></div>" for k, v in facts.items())
    reached = (f"<p>Final success with the plain prompt: <strong>{rate(final)}</strong> (95% Wilson interval, "
               f"n {final['n']})</p>\n" if final else "")
    return (f'<header><h1>{name}</h1>\n<p class="notice">{esc(notice)}</p>\n{reached}<dl class="facts">{listed}</dl>'
            "</header>\n")


def phase_starts(rows: list[dict]) -> list[tuple[float, str]]:
    """The first iteration of each phase, with its name."""
    return [(x, PHASES[int(phase)]) for phase, x in {r["phase"]: r["iteration"] for r in reversed(rows)}.items()]


def curves_section(rows: list[dict], results: list[dict], remark: str) -> str:
    """Every curve over iterations, and the numbers behind them as a table."""
    marks = phase_starts(rows)
    x_range = (0, max([r["iteration"] for r in rows + results], default=0))
    out, kinds, band = [], ("plain", "skill"), "band: one standard error on either side"

    def draw(title: str, what: str, series: list[Series], y: tuple[float, float] | None = (0, 1)) -> None:
        out.append(chart(f"curve{len(out)}", title, what, series, marks, x_range, y=y))

    def column(name: str, error: Callable[[dict], float] = lambda r: math.nan) -> list[tuple[float, float, float, float]]:
        values = [(r["iteration"], r.get(name, math.nan), error(r)) for r in rows]
        return [(x, v, v - e, v + e) for x, v, e in values]

    def binomial(kind: str) -> Callable[[dict], float]:
        p, n = f"success_{kind}", f"n_{kind}"
        return lambda r: math.sqrt(max(r[p] * (1 - r[p]), 0) / r[n]) if r[n] > 0 else math.nan

    if rows:
        draw("Success in training", f"Share of the rollouts that reach the goal; {band}",
             [Series(k, column(f"success_{k}", binomial(k))) for k in kinds])
    if results:
        at = lambda r: (r["iteration"], r["successes"] / r["n"], *wilson(r["successes"], r["n"]))
        draw("Evaluations", "Success on a fixed panel; bars: 95% Wilson intervals", [
            Series(f"{esc(panel)}, {'with skills' if guided else 'plain'}",
                   [at(r) for r in results if (r["panel"], r["skills"]) == (panel, guided) and r["n"]],
                   bars=True, line=not guided)
            for panel, guided in dict.fromkeys((r["panel"], r["skills"]) for r in results)])
    if rows and "score_plain" in rows[0]:
        draw("Score in training", f"Mean score of the rollouts, 0 to 1; {band}", [
            Series(k, column(f"score_{k}", lambda r, k=k: r.get(f"score_{k}_se", math.nan))) for k in kinds])
    for name, title, what in CURVES if rows else ():
        if name in rows[0]:
            draw(title, what, [Series(title, column(name))], (0, 1) if name == "invalid_rate" else None)
    if rows and rows[-1]["phase"] > 0:
        draw("Skills in the bank", "Number of skills in each state",
             [Series(state, column(f"skills_{state}")) for state in skills.STATES], None)
    columns = (*COLUMNS, *(c for c, *_ in CURVES), "lam", "internal_rows")
    columns = [c for c in columns if rows and c in rows[0]]
    cells = [[PHASES[int(r[c])] if c == "phase" else number(r[c]) for c in columns] for r in rows]
    cells = [[f"{r['iteration']:.0f}", *line[1:]] for r, line in zip(rows, cells)]
    full = folded(f"The same numbers as a table (iterations: {len(rows)})",
                  table("Metrics by iteration", [c.replace("_", " ") for c in columns], cells))
    bands = "A curve without a band is of a figure for which metrics.csv has no spread." if rows else ""
    return section("curves", "Curves", f"<p>{remark} {bands}</p>", f'<div class="grid3">{"".join(out)}</div>\n',
                   full if rows else "")


def results_section(results: list[dict]) -> str:
    """Every evaluation, then by task type, then every task."""
    if not results:
        return section("results", "Evaluations", "<p>results.json is missing or empty: nothing has been evaluated yet.</p>")
    score = lambda r: (f"{number(r['score'])} &plusmn; {number(r['score_se'])}"
                       if misfit(r, {"score": FLOAT, "score_se": FLOAT, ...: ANYTHING}, "") == "" else "&ndash;")
    head = ["evaluation", "panel", "prompt", "iteration", "success [95%]", "n", "score &plusmn; s.e.", "steps", "invalid"]
    lines = [[esc(r["label"]), esc(r["panel"]), "with skills" if r["skills"] else "plain", str(r["iteration"]), rate(r),
              str(r["n"]), score(r), number(r["mean_steps"]), number(r["invalid_rate"])] for r in results]
    if not any("score" in r for r in results):
        for line in (head, *lines):
            del line[6]
    columns = [esc(r["label"] + (f" ({r['panel']})" if r["panel"] != results[0]["panel"] else "")) for r in results]
    kinds, games = (sorted({k for r in results for k in r[part]}) for part in ("kinds", "outcomes"))
    none, word = dict(n=0, successes=0), {True: "won", False: "lost", None: "&ndash;"}
    by_kind = [[esc(k), *(f"{rate(part)}<br><small>n {part['n']}</small>" for r in results
                          for part in [r["kinds"].get(k, none)])] for k in kinds]
    by_game = [[esc(g), *(word[r["outcomes"].get(g)] for r in results)] for g in games]
    return section("results", "Evaluations",
                   table("Evaluations: success with its 95% Wilson interval", head, lines, 3),
                   table("Success by task type, with its 95% Wilson interval", ["task type", *columns], by_kind),
                   folded(f"Every task of the panel ({len(games)})",
                          table("Every task, won or lost", ["task", *columns], by_game), "long"))


@dataclasses.dataclass
class History:
    """A skill's states, each with the iteration of its change, and its utility with the standard error after each effect: what the
    bank's rules (S6) give for its effects, recorded again."""
    changes: list[tuple[int, str]]
    utility: list[tuple[float, float, float, float]]

    @classmethod
    def of(cls, bank: skills.SkillBank, skill: skills.Skill) -> History:
        """Recorded in a bank of its own."""
        twin = skills.Skill(skill.id, skill.condition, skill.strategy, skill.born, skill.source)
        replay, told = dataclasses.replace(bank, skills=[twin], rejected=Counter()), cls([(skill.born, "candidate")], [])
        for iteration, delta in skill.effects:
            if replay.record(twin, delta, iteration) != told.changes[-1][1]:
                told.changes.append((iteration, twin.state))
            value, error = bank.utility(twin), bank.stderr(twin)
            error = math.nan if error is None else error
            told.utility.append((iteration, value, value - error, value + error))
        return told


def skill_card(bank: skills.SkillBank, skill: skills.Skill, history: History, x_range: tuple[float, float]) -> str:
    """One skill and its history."""
    changes, error = history.changes, bank.stderr(skill)
    spread = "no standard error before 2 pairs" if error is None else f"&plusmn; {error:.2f} s.e."
    effects = [(x, delta, math.nan, math.nan) for x, delta in skill.effects]
    drawn = chart(f"skill{skill.id}", f"Effect of skill {skill.id}", "Paired effects, and the utility with its standard error",
                  [Series("utility", history.utility), Series("paired effects", effects, line=False)], changes, x_range, y=(-1, 1),
                  height=150, level="h4") if skill.n else "<p>Not yet tried in a pair.</p>"
    state = changes[-1][1]
    doubt = f"<p>The file says {skill.state}, but these effects lead to {state}.</p>" * (state != skill.state)
    return (f'<article><p class="skill">{esc(skill.text)}</p>\n<p><strong class="state">{skill.state}</strong> '
            f"utility {bank.utility(skill):+.2f} {spread}, n {skill.n}<br>"
            f'{" &rarr; ".join(f"{state} ({x})" for x, state in changes)}<br>'
            f"<small>skill {skill.id}, mined from {esc(skill.source)}</small></p>{doubt}\n{drawn}</article>\n")


def lives_figure(bank: skills.SkillBank, histories: list[History], x_range: tuple[float, float],
                 marks: list[tuple[float, str]]) -> str:
    """All skills on one timeline, in the order of their births."""
    lives = []
    for skill, history in sorted(zip(bank.skills, histories), key=lambda pair: (pair[0].born, pair[0].id)):
        changes = history.changes
        ends = [x for x, _ in changes[1:]] + [changes[-1][0] if changes[-1][1] == "retired" else x_range[1]]
        lives.append(Life(f"{skill.id}", f"{bank.utility(skill):+.2f}" if skill.n else "&ndash;",
                          f"{esc(skill.text)} ({', '.join(f'{state} {x}' for x, state in changes)})",
                          [(x, end, skills.STATES.index(state)) for (x, state), end in zip(changes, ends)]))
    return timeline("lives", "Lives of the skills", "Each row is a skill, by its number: a line begins at its birth, changes "
                    "when it is promoted, and ends when it is retired. The cards below say the same in words", lives,
                    skills.STATES, "utility", [(x, label) for x, label in marks if x >= x_range[0]], x_range)


def skills_section(bank: skills.SkillBank | None, cfg: dict[str, Any], rows: list[dict]) -> str:
    """The bank: its rejections, its timeline, and every skill's card by state and utility; or why there are none."""
    parts = []
    if not bank or not bank.skills:
        why = ("the variant gigpo has no skills" if cfg["variant"] == "gigpo" else "skills.json is missing" if not bank else
               "the run is in warm-up" if not rows or rows[-1]["phase"] == 0 else "nothing the policy wrote was accepted")
        parts.append(f"<p>There are no skills to show: {why}.</p>")
    if bank and (bank.skills or bank.rejected):
        average = (f"their moving average, b = {bank.ema:g}" if bank.ema else
                   f"their mean, shrunk by n / (n + {bank.kappa:g})")
        rejected = ", ".join(f"{reason.replace('_', ' ')} {n}" for reason, n in bank.rejected.items()) or "none"
        parts.append(f"<p>{len(bank.skills)} skills accepted: "
                     f"{', '.join(f'{n} {state}' for state, n in bank.counts().items())}. Rejected: {rejected}. A paired "
                     "effect is the success of a group's half with the skill minus that of its half without. The utility "
                     f"is {average}; its band is one standard error on either side. "
                     "In brackets: the iteration of a change.</p>\n")
    if bank and bank.skills:
        known = [x for s in bank.skills for x in (s.born, *(x for x, _ in s.effects))]
        x_range = (min(known), int(max([*known, *(r["iteration"] for r in rows)])))
        histories = [History.of(bank, skill) for skill in bank.skills]
        parts.append(lives_figure(bank, histories, x_range, phase_starts(rows)))
        for state in ("active", "candidate", "retired"):
            group = sorted(((s, h) for s, h in zip(bank.skills, histories) if s.state == state),
                           key=lambda pair: -bank.utility(pair[0]))
            cards = f'<div class="grid3">{"".join(skill_card(bank, s, h, x_range) for s, h in group)}</div>'
            if group:
                parts.append(folded(f"<h3>{len(group)} {state}, by utility</h3>", cards,
                                    "open" if state == "active" else ""))
    return section("skills", "Skill bank", *parts)


def spaces(pieces: list[str], text: str) -> list[str]:
    """The white space that the text has before each piece: a tokenizer of words has none in its pieces.

    >>> spaces(["<a>", "look", "in", "[", "box"], "<a> look in [box")
    ['', ' ', ' ', ' ', '']
    """
    found, at = [], 0
    for piece in pieces:
        start = text.find(piece, at)
        space = text[at:max(start, at)]
        found.append(space if space.isspace() else "")
        if start == at + len(found[-1]):
            at = start + len(piece)
    return found


def step_item(place: int, step: dict[str, Any], scale: float) -> str:
    """What was seen, the sampled tokens, what they were worth. `scale` is the advantage that gets the full tint."""
    a, seen, pieces = step["advantage"], step["observation"], step["pieces"]
    told = [token for token in zip(spaces(pieces, step["text"]), pieces, step["weights"]) if token[1]]
    tokens = "".join("".join(f'{space}<b style="--w:{min(w, 1):.2f}">{esc(p)}</b>' for space, p, w in part) if weighted
                     else esc("".join(space + p for space, p, _ in part))
                     for weighted, part in itertools.groupby(told, lambda token: token[2] > 0))
    tint = f' class="{"pos" if a > 0 else "neg"}" style="--a:{min(abs(a) / scale, 1):.2f}"' if a and finite(a) else ""
    gated = [w for w in step["weights"] if w > 0]
    distilled = f"; distilled: {len(gated)} of {len(pieces)} tokens, weight {max(gated):.2f}" if gated else ""
    seen = esc(seen) if len(seen) <= 400 else folded(f"{esc(seen[:200])} &hellip;", esc(seen[200:])).strip()
    return (f'<li><div class="seen">[{place}] {seen}</div><p class="said"><span{tint}>{tokens}</span></p><p class="worth">'
            f'advantage {a:+.2f}, reward {step["reward"]:g}{"" if step["valid"] else ", <strong>invalid</strong>"}'
            f"{distilled}</p></li>\n")


def samples_section(samples: list[dict], folder: Path) -> str:
    """Each sample, a plain episode beside a guided one of the same task, token by token; the last is unfolded."""
    texts, parts, kept = sorted(folder.glob("*.txt")), [], len([*folder.glob("*.json")])
    if samples:
        shown = "All" if len(samples) == kept else f"{len(samples)}, evenly spread, of the"
        parts.append(f"{LEGEND}<p>{shown} {kept} samples of the run, the last one unfolded.</p>\n")
    else:
        parts.append(f"<p>This run {'has samples without token data' if texts else 'has no sample episodes yet'}.</p>\n")
        parts += [folded(f"The newest sample as text ({esc(path.name)})",
                         f"<pre>{esc(path.read_bytes().decode(errors='replace'))}</pre>") for path in texts[-1:]]
    for s in samples:
        steps = [step for e in s["episodes"] for step in e["steps"]]
        scale = max((abs(step["advantage"]) for step in steps if finite(step["advantage"])), default=0) or 1
        columns = []
        for e in sorted(s["episodes"], key=lambda e: e["skill"] is not None):
            prompt = "Plain prompt" if e["skill"] is None else f"With the skill <q>{esc(e['skill'])}</q>"
            listed = "".join(step_item(t, step, scale) for t, step in enumerate(e["steps"]))
            end = "success" if e["success"] else "failure"
            columns.append(f"<article><h4>{prompt}: {end}, {len(e['steps'])} steps</h4><ol>{listed}</ol></article>\n")
        parts.append(folded(f"<h3>Iteration {s['iteration']}, {PHASES[s['phase']]}: {esc(s['goal'])}</h3>",
                            f'<p><small>{esc(s["task"])}</small></p><div class="grid2">{"".join(columns)}</div>',
                            "open" if s is samples[-1] else ""))
    return section("samples", "Sample episodes", *parts)


LEGEND = """<p>Each response is tinted by the advantage of its step: <span class="pos" style="--a:1">blue for +</span>,
made likelier by the update; <span class="neg" style="--a:1">orange for &minus;</span>, made less likely; fullest where
the sample has its largest. Tokens in <span class="said"><b style="--w:1">underlined bold</b></span> are distilled into
the plain prompt in phase 2, the line as thick as their weight; for the others the gate is closed or the weight is 0.</p>
"""


def config_section(cfg: dict[str, Any]) -> str:
    """Every setting as used, beside its default."""
    default = {f.name: f.default for f in dataclasses.fields(Config)}
    show = lambda v: f"<code>{esc(v)}</code>" if v != "" else "&ndash;"
    rows = [[esc(k), show(v), show(default.get(k, "")), "changed" if v != default.get(k) else ""] for k, v in cfg.items()]
    head = ["setting", "value", "default", "changed?"]
    body = table("Every setting as used, beside its default", head, rows, len(head))
    changed = sum(row[-1] == "changed" for row in rows)
    return section("config", "Configuration", folded(f"{len(rows)} settings, {changed} changed from the default", body))


# ---- 3. The page ---------------------------------------------------------------------------------------------


def document(title: str, links: dict[str, str], header: str, main: str, alive: bool = False) -> str:
    """A whole page in HTML: `links` from the ids of its sections to their names; one that is `alive` loads itself anew, by a script
    that is known by its hash: no other runs."""
    known = f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(RELOAD.encode()).digest()).decode()}'" * alive
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'{known}">
{f"<script>{RELOAD}</script>" * alive}<title>{title}</title><style>{STYLE}</style></head>
<body>{header}
<nav aria-label="Sections">{"".join(f'<a href="#{k}">{v}</a>' for k, v in links.items())}</nav>
<main>{main}</main></body></html>
"""


def page(folder: Path, alive: bool = False) -> str:
    """The whole page. Raises UserError for a folder without config.json, or with files that siri.py did not write."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give a run folder such as runs/NAME")
    cfg = read_json(folder / "config.json", CONFIG)
    rows, remark = read_metrics(folder / "metrics.csv")
    results, samples = read_results(folder / "results.json"), read_samples(folder / "samples")
    bank = load_bank(folder) if (folder / "skills.json").exists() else None
    name = esc(cfg.get("name") or folder.resolve().name)
    links = dict(curves="Curves", results="Evaluations", skills="Skill bank", samples="Sample episodes",
                 config="Configuration")
    parts = (curves_section(rows, results, remark), results_section(results), skills_section(bank, cfg, rows),
             samples_section(samples, folder / "samples"), config_section(cfg))
    header = header_section(name, cfg, rows, results, alive)
    return document(f"{name}: report of a SIRI run", links, header, "\n".join(parts), alive)


def write_page(path: Path, text: str) -> Path:
    """Write a page, so that it reads the same in every locale. UserError if it can't be written."""
    try:
        write_text(path, text.encode("ascii", "xmlcharrefreplace").decode())
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e
    return path


def write(folder: Path, alive: bool = False) -> Path:
    """Write the report of the run in `folder`, which goes on if it is `alive`, and return its path. UserError as `page`, and if
    it can't be written."""
    refuse_links(folder)
    return write_page(folder / "report.html", page(folder, alive))
