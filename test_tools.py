"""Commands beside a run, the lessons, and what the documentation promises."""

import ast
import base64
import contextlib
import copy
import dataclasses
import doctest
import fcntl
import hashlib
import html
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sqlite3
import struct
import subprocess
import sys
import termios
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distill
import envs
import gigpo
import siri
import skills
from conftest import CHATML, HERE, awake, config, learner_of, new_bank, offline, slow, some_rows, stranger_config, write_model
from conftest import metrics as run_metrics
from policy import Policy, UserError, make_optimizer
from run import ACTIONS, add_result, append_metrics, main, parse_arguments, save_checkpoint, save_sample, write_report
from tools import (
    bench,
    compare,
    exercises,
    export,
    figures,
    gym_text,
    imitation,
    metrics,
    probe,
    progress,
    ranks,
    report,
    settings,
    track,
    worlds,
)
from tools import play as terminal
from tools import terminal as lines
from tools.files import latest_checkpoint, read_json, write_json
from tools.metrics import wilson
from tools.oracle import winning_actions
from tools.settings import flag, make_environment, resolve

# ---- 1. the benchmark ------------------------------------------------------------------------------------------------


def spoken(groups):
    return [[s.response for s in e.steps] for group in groups for e in group]


@slow
def test_the_benchmarks_rollouts_play_the_same_episodes(world):
    """The decoder, and `generate` one prompt at a time and in lock step."""
    env, policy = world
    tasks = bench.some_tasks(env, 0, 4)[2:]                                 # the second is won before the steps run out
    ours, alone, in_step = (bench.play(p, env, tasks, 2, policy.cfg) for p in (
        policy, bench.one_by_one(policy), bench.in_lock_step(policy)))
    assert spoken(ours) == spoken(alone) == spoken(in_step)
    assert len({len(e.steps) for group in ours for e in group}) > 1         # so the batch did shrink


def test_the_textbook_update_has_our_gradient(world):
    env, policy = world
    torch.manual_seed(0)
    rows = bench.rows_of(bench.play(policy, env, bench.some_tasks(env, 1, 1), 4, policy.cfg), policy.cfg, env)[:9]
    assert any(r.advantage for r in rows)
    ours, theirs = (bench.one_update(side, policy, rows, policy.cfg)["grad_norm"] for side in ("ours", "textbook"))
    assert ours == pytest.approx(theirs, rel=1e-3) and ours > 0


def test_peak_memory_is_seen_and_is_that_of_the_process_only():
    torch.ones(2**26).sum()                                                 # 256 MiB before it don't count
    with bench.Peak("cpu") as peak:
        torch.ones(2**24).sum()                                             # 64 MiB
    assert 62 <= peak.mib < 100


def test_a_row_compares_medians_and_checks_the_requirement():
    r = bench.row("p", "w", "u", [10.0, 30.0, 20.0], "other", [5.0, 2.0, 4.0], ">= 5")
    assert (r["ours"]["median"], r["ours"]["min"], r["ours"]["max"], r["other"]["median"]) == (20, 10, 30, 4)
    assert r["ratio"] == dict(median=5, min=2, max=15) and r["met"] is True
    assert bench.row("p", "w", "u", [2.0], require="<= 1.9")["met"] is False
    assert "NO" in bench.line(bench.row("p", "w", "u", [2.0], require="<= 1.9"))


def test_sides_take_turns_after_a_warm_up():
    seen = []
    side = lambda name: lambda k: seen.append((name, k)) or dict(x=k)
    assert bench.alternate(2, a=side("a"), b=side("b")) == dict(a=dict(x=[1, 2]), b=dict(x=[1, 2]))
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


@pytest.mark.parametrize("part, rows, work", [
    ("rollouts", 4, ("steps", "tokens")), pytest.param("logprobs", 3, (), marks=slow), pytest.param("paper", 12, (), marks=slow)])
def test_a_benchmark_prints_and_writes_what_it_promises(tmp_path, capsys, part, rows, work):
    path = tmp_path / "bench.json"
    bench.main([part], config(), rounds=1, quick=True, path=path)
    report, text = json.loads(path.read_text()), capsys.readouterr().out
    assert {"versions", "processor", "threads", "device", "date", "commit", "rounds", "seed", "rows"} <= set(report)
    assert {"python", "torch", "transformers", "peft"} <= set(report["versions"]) and report["quick"] is True
    assert len(report["rows"]) == rows
    for r in report["rows"]:
        assert r["part"] == part and r["what"] in text and len(r["ours"]["values"]) == 1
        for side in filter(None, (r["ours"], r["other"])):
            assert 0 < side["min"] <= side["median"] <= side["max"] < math.inf
        if r["other"]:
            assert r["ratio"]["median"] == pytest.approx(r["ours"]["median"] / r["other"]["median"])
        for counted in work if r["other"] else ():
            assert min(r["work"]["ours"][counted] + r["work"]["other"][counted]) > 0
    if part == "logprobs":
        assert report["rows"][-1]["met"] is True                            # the gradients are equal


def test_an_unknown_benchmark_is_named(tmp_path):
    with pytest.raises(UserError, match="--bench rollout: unknown part; choose from rollouts, "):
        bench.main(["rollout"], config(), path=tmp_path / "bench.json")
    assert not list(tmp_path.iterdir())


def test_without_trl_its_benchmark_is_skipped_with_the_mend(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    bench.main(["trl"], config(), rounds=1, quick=True, path=tmp_path / "bench.json")
    row, = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["part"] == "trl" and row["skipped"].endswith(f"pip install {bench.TRL}")
    assert row["skipped"] in capsys.readouterr().out

# ---- 2. report and play ----------------------------------------------------------------------------------------------


HOSTILE = "</style></title><script>alert('x')</script><img src=//e.example onerror=f()>&amp;\"'\x1b[31m\u202e\ud800"


class Outline(HTMLParser):
    """A page as its elements, its text, and what is wrong with its nesting."""
    VOID = {"meta", "br", "path", "circle"}                                # void, or written <path .../> inside SVG

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.texts, self.faults = [], [], [], []
        self.feed(page)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another element")

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def metrics_row(iteration, phase, **values):
    """A row as a run writes it, n rollouts of each kind from phase 1 on."""
    skill = dict(success_skill=0.75, n_skill=32) if phase else dict(success_skill=math.nan, n_skill=0)
    return dict(iteration=iteration, phase=phase, seconds=60.0 * (iteration + 1), env_steps=500 * (iteration + 1),
                success_plain=0.25, n_plain=32, **skill, mean_steps=9.5, invalid_rate=0.125, kl=0.01, entropy=0.2,
                skills_candidate=iteration, skills_active=phase, skills_retired=0, rollout_tokens_per_s=1200.0,
                update_tokens_per_s=9000.0, lam=0.0, internal_rows=0) | values


def evaluation(label, iteration, successes, n, **values):
    part = dict(n=n, successes=successes, success=successes / n, interval=wilson(successes, n), mean_steps=7.5,
                invalid_rate=0.25)
    return dict(label=label, panel=f"alfworld valid_seen, {n} games", skills=False, iteration=iteration, **part,
                kinds={"pick_and_place_simple": part}, outcomes={f"game {k}": k < successes for k in range(n)}) | values


def sampled(policy, text, skill=None, **values):
    ids = policy.tokenizer.encode(text)
    return siri.Step([1], ids, policy.decode(ids), "look", "You see a pen 1.", "", None, "", **values)


@lru_cache(maxsize=1)
def tiny_policy():
    return Policy(resolve({"preset": "tiny"})[0])


@pytest.fixture
def reported(tmp_path):
    """A finished run's folder as the program writes it (by its own functions), without training."""
    folder = tmp_path / "finished"
    folder.mkdir()
    write_json(folder / "config.json", dataclasses.asdict(resolve({"preset": "tiny", "name": "finished"})[0]))
    for iteration in range(6):
        append_metrics(folder, metrics_row(iteration, iteration // 2, success_plain=iteration / 8))
    for label, at, wins, guided in (("base", 0, 21, False), ("phase 1 with skills", 4, 102, True), ("final", 6, 105, False)):
        add_result(folder, evaluation(label, at, wins, 120, skills=guided))
    bank = new_bank(kappa=1.0, n_eval=2, tau_up=0.05, tau_down=0.0, m_retire=2)
    good, bad, _ = (bank.add(f"the task needs {word}", "look on the desk first", 2, "game 7") for word in ("pen", "cup", "egg"))
    for iteration, delta in ((2, -0.25), (3, 0.5), (4, 0.75)):
        bank.record(good, delta, iteration)
    for iteration in (2, 3, 4):
        bank.record(bad, -0.5, iteration)
    bank.reject("duplicate")
    write_json(folder / "skills.json", bank.to_json())
    policy, task = tiny_policy(), envs.Task("household0-0/train/1", "kind", "put a pen in shelf", "train")
    steps = [sampled(policy, "<think> find pen </think> <action> go to desk 1 </action>", advantage=1.5, reward=10.0),
             sampled(policy, "<think> find pen </think> <action> look </action>", advantage=-0.75, valid=False)]
    guided = [dataclasses.replace(step, plain=[1]) for step in steps]
    group = [siri.Episode(task, good, guided), siri.Episode(task, None, steps, success=True)]
    learner = learner_of(policy, env=SimpleNamespace(success_reward=10.0), bank=bank)
    save_sample(folder, learner, siri.Iteration(5, 2, groups=[group], effects=[0.5]))
    return folder


def written(folder):
    path = report.write(folder)
    assert path == folder / "report.html"
    page = path.read_text(encoding="ascii")
    return page, Outline(page)


def test_the_report_says_what_the_files_say(reported):
    page, outline = written(reported)
    lo, hi = wilson(105, 120)
    assert f"Final success with the plain prompt: 0.875 [{lo:.3f}, {hi:.3f}] (95% Wilson interval, n 120)" in outline.text
    assert outline.text.count(f"0.875 [{lo:.3f}, {hi:.3f}]") == 3          # header, evaluations, task type
    assert "small generated world: its scores are not benchmark scores" in outline.text
    assert "plain: 0 at iteration 0, 0.625 at 5; lowest 0, highest 0.625. skill: 0.75 at iteration 2, 0.75 at 5" in outline.text
    # Bands: skill's at iterations 2-5 is .75 +- sqrt(.75 * .25 / 32) = .0765, between y = 0 at 170 and y = 1 at 34.
    band = re.search(r'class="s1">.*?points="([^"]+)"', page)[1].split()
    heights = [float(p.split(",")[1]) for p in band]
    assert heights == pytest.approx([170 - 136 * 0.82655] * 4 + [170 - 136 * 0.67345] * 4, abs=0.06)
    # The phases begin at iterations 0, 2 and 4.
    marks = re.findall(r'class="mark" d="M([\d.]+)', page[:page.index("</svg>")])
    assert [float(x) for x in marks] == pytest.approx([42 + 308 * (k + 0.5) / 7 for k in (0, 2, 4)], abs=0.06)
    won = re.findall(r'<tr><th scope="row">game \d+</th>.*?</tr>', page)
    assert len(won) == 120 and sum(row.count(">won<") for row in won) == 21 + 102 + 105
    add_result(reported, evaluation("eval", 6, 1, 2, notice="What was played.", versions={"torch": "9.9"}))
    text = written(reported)[1].text
    assert "What was played." in text and "torch 9.9" in text and "eval (alfworld valid_seen, 2 games)" in text


def test_the_report_tells_every_skills_history(reported):
    """Effects -.25, .5, .75 with kappa 1: the second gives U = 2/3 * .125 = .083 > .05, the third 3/4 * 1/3 = .25."""
    page, outline = written(reported)
    assert "active utility +0.25 ± 0.23 s.e., n 3 candidate (2) → active (3)" in outline.text
    assert "retired utility -0.38 ± 0.00 s.e., n 3 candidate (2) → retired (4)" in outline.text
    assert "candidate utility +0.00 no standard error before 2 pairs, n 0 candidate (2)" in outline.text
    assert "Not yet tried in a pair" in outline.text and "Rejected: duplicate 1" in outline.text
    assert "paired effects: -0.25 at iteration 2, 0.75 at 4; lowest -0.25, highest 0.75" in outline.text
    bank = read_json(reported / "skills.json")
    bank["skills"][0]["state"] = "retired"
    write_json(reported / "skills.json", bank)
    assert "The file says retired, but these effects lead to active" in written(reported)[1].text


def test_the_report_shows_advantage_and_weight_of_every_token(reported):
    page, outline = written(reported)
    samples = page[page.index('<section id="samples">'):page.index('<section id="config">')]
    assert re.findall(r'<b style="--w:([\d.]+)">([^<]*)</b>', samples)[1:] == [
        ("0.75", word) for word in ("go", "to", "desk", "1")]              # the first is the legend's
    assert re.findall(r'<span class="(pos|neg)" style="--a:([\d.]+)">&lt;', samples) == [("pos", "1.00"), ("neg", "0.50")] * 2
    assert samples.index("Plain prompt: success, 2 steps") < samples.index("With the skill <q>when the task needs pen")
    assert samples.count("failure, 2 steps") == 1
    assert "advantage +1.50, reward 10; distilled: 4 of 10 tokens, weight 0.75" in outline.text
    assert outline.text.count("advantage -0.75, reward 0, invalid") == 2
    assert "<think> find pen </think> <action> go to desk 1 </action>" in outline.text          # words with their spaces
    assert report.spaces(["<a>", "cl", "ick", "[", "red", "", "]"], "<a> click[red]") == ["", " ", "", "", "", "", ""]
    assert report.spaces(["go", " on", "\ufffd", "\ufffd", " now"], "go on\u00e9 now") == [""] * 5   # a letter of two tokens
    assert report.spaces(["x", "b", "c"], "b x c") == ["", "", ""]         # a piece out of place moves nothing
    (reported / "samples" / "0005.json").unlink()                          # an older run's
    assert "This run has samples without token data" in written(reported)[1].text


def test_a_run_that_goes_on_after_its_end_is_not_finished(reported):
    """Its metrics have a row more than there were when it ended."""
    path = reported / "metrics.csv"
    lines = path.read_bytes().decode().splitlines(keepends=True)
    results = json.loads((reported / "results.json").read_text())
    results[-1]["iteration"] = len(lines) - 1
    write_json(reported / "results.json", results)
    assert "Final success" in written(reported)[1].text
    path.write_bytes("".join([*lines, lines[-1]]).encode())
    text = written(reported)[1].text
    assert "not finished: running, or stopped" in text and "Final success" not in text


def test_a_sample_holds_the_weights_of_the_actions_that_pass_the_gate(reported):
    guided, plain = json.loads((reported / "samples" / "0005.json").read_text())["episodes"]
    weights = lambda episode: [step["weights"] for step in episode["steps"]]
    assert weights(guided) == [[0.0] * 5 + [0.75] * 4 + [0.0], [0.0] * 7]           # 1.5 / a_max, the action: go to desk 1
    assert weights(plain) == [[0.0] * 10, [0.0] * 7]


def is_one_accessible_page(page, least):
    """Checks of a page that needs no other, with so many figures at least."""
    outline = Outline(page)
    assert outline.faults == []
    assert outline.all("html", lang="en") and outline.all("meta", name="viewport")
    assert not {tag for tag, _ in outline.elements} & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert {a["href"][0] for a in outline.all("a")} == {"#"} and "http:" not in page and "https:" not in page
    assert re.findall(r"url\(|@import|src=", page) == []
    ids = [a["id"] for _, a in outline.elements if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in outline.all("a")} <= set(ids)
    figures_ = outline.all("svg", role="img")
    assert len(figures_) == len(outline.all("figure")) > least
    for svg in figures_:
        assert len(svg["aria-labelledby"].split()) == 2 and set(svg["aria-labelledby"].split()) <= set(ids)
    assert all(a.get("aria-hidden") == "true" for a in outline.all("svg") if "role" not in a)
    assert len(outline.all("table")) == len(outline.all("caption")) == len(outline.all("div", role="region", tabindex="0"))
    assert all(a.get("scope") in ("col", "row") for a in outline.all("th"))
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))


def test_the_report_is_one_accessible_page(reported):
    page, _ = written(reported)
    is_one_accessible_page(page, 8)
    assert page == written(reported)[0]                                    # the same files, the same bytes


def test_the_report_of_a_live_run_says_so_and_loads_itself_anew(reported):
    assert "<script" not in written(reported)[0]
    page = write_report(reported, alive=True).read_text()
    script = re.search("<script>(.*?)</script>", page)
    known = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert script[1] == "setTimeout(() => location.reload(), 60000)" and f"; script-src 'sha256-{known}'\"" in page
    page = page.replace(script[0], "")
    assert re.search(r"alive, as of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", page)
    is_one_accessible_page(page, 8)


@pytest.mark.parametrize("fault", [UserError("results.json: no"), KeyError("a\nfault"), MemoryError()])
def test_a_fault_in_the_report_ends_no_run(reported, monkeypatch, capsys, fault):
    def fails(folder):
        raise fault

    monkeypatch.setattr(report, "read_results", fails)
    assert write_report(reported, alive=True) is None and not (reported / "report.html").exists()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"warning: the report is not written ({type(fault).__name__}" in out


def test_a_run_keeps_its_report_and_says_so_once(runs):
    for cwd in runs:
        page = (cwd / "runs/x/report.html").read_text()
        assert "State finished" in Outline(page).text and "<script" not in page
        columns = dict.fromkeys(run_metrics(cwd)[0])
        assert all(f"<h3>{title}</h3>" in page for column, title, _ in report.CURVES if column in columns) and "sampler_gap" in columns
        assert page.count("<details open><summary><h3>Iteration ") == 1 and "All " in page
    assert (runs[0] / "out.txt").read_text().count("report: runs/x/report.html") == 1


def test_the_report_of_an_old_run_leaves_out_what_it_did_not_record(tmp_path):
    """The run in assets/ has every column; the one that is made here lacks some."""
    folder = tmp_path / "old"
    shutil.copytree(HERE / "assets/tiny-run", folder)
    page, outline = written(folder)
    n = len([*folder.glob("samples/*.json")])
    assert f"All {n} samples of the run" in outline.text and page.count("<summary><h3>Iteration ") == n > 5
    head, *lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    first = dict(zip(head, lines[0]))
    assert f"Gradient norm: {float(first['grad_norm']):.3g} at iteration 0" in outline.text
    kept = [k for k, name in enumerate(head) if name not in ("grad_norm", "clip_fraction", "zero_signal_groups", "solved_tasks")]
    (folder / "metrics.csv").write_text("".join(",".join(line[k] for k in kept) + "\n" for line in [head, *lines]))
    page, outline = written(folder)
    assert "Gradient norm" not in page and "Solved tasks" not in page and "KL to the base model" in page and outline.faults == []


def test_samples_that_are_too_many_are_thinned_evenly(reported, monkeypatch):
    """Ten of one size on a page with room for four and a half: every third, up to the last."""
    data = read_json(reported / "samples/0005.json")
    for k in range(10):
        write_json(reported / f"samples/{k:04d}.json", data | dict(iteration=10 + k))
    size = (reported / "samples/0000.json").stat().st_size
    monkeypatch.setattr(report, "SAMPLES_MIB", 4.5 * size / 2**20)
    page, outline = written(reported)
    assert re.findall(r"<h3>Iteration (\d+), ", page) == ["10", "13", "16", "19"]
    assert "4, evenly spread, of the 10 samples of the run" in outline.text


def test_the_timeline_has_every_skills_life(reported):
    """Iterations 2 to 5, so that a fourth of the axis is one: promoted at 3, retired at 4, born at 2 and no more."""
    page, _ = written(reported)
    drawn = page[page.index('aria-labelledby="livest'):]
    drawn = drawn[:drawn.index("</svg>")]
    at = lambda x: 42 + (318 - 42) * (x - 2 + 0.5) / 4
    rows = [[(style, float(a), float(b)) for style, a, b in re.findall(r'class="(s\d)"><path class="line" d="M([\d.]+) \d+H([\d.]+)"', row)]
            for row in drawn.split("<title>when ")[1:]]
    assert rows == [[("s0", *map(pytest.approx, (at(2), at(3)))), ("s1", *map(pytest.approx, (at(3), at(5))))],
                    [("s0", *map(pytest.approx, (at(2), at(4)))), ("s2", *map(pytest.approx, (at(4), at(4))))],
                    [("s0", *map(pytest.approx, (at(2), at(5))))]]
    assert re.findall(r'<text class="tag" x="358"[^>]*>([^<]*)<', drawn) == ["+0.25", "-0.38", "&ndash;"]


def test_paired_tests_are_what_the_field_computes():
    """McNemar by hand: 1 to 7, 2 (1 + 8) / 256. The interval: the example of Newcombe (1998), method 10; and swapped."""
    assert compare.mcnemar(1, 7) == 18 / 256 and compare.mcnemar(5, 5) == 1 and compare.mcnemar(0, 0) == 1
    assert compare.mcnemar(0, 6000) == 0 and compare.mcnemar(3000, 3000) == 1             # no overflow
    assert compare.paired_difference(20, 2, 12, 16) == pytest.approx((0.2, 0.0562, 0.3292), abs=5e-5)
    assert compare.paired_difference(20, 12, 2, 16) == pytest.approx((-0.2, -0.3292, -0.0562), abs=5e-5)
    for table in itertools.product(range(3), repeat=4):
        if any(table):
            d, low, high = compare.paired_difference(*table)
            assert -1 - 1e-9 <= low <= d <= high <= 1 + 1e-9 and d == pytest.approx((table[2] - table[1]) / sum(table))
    with pytest.raises(ValueError, match="no games"):
        compare.paired_difference(0, 0, 0, 0)


@pytest.fixture
def other(reported):
    """A second run of the same games: another variant, 90 games won where the first won 105, the first 30 lost, and no phase 1."""
    folder = reported.with_name("other")
    shutil.copytree(reported, folder)
    write_json(folder / "config.json", read_json(reported / "config.json") | dict(variant="gigpo", lr=0.5, name="other"))
    wins = {f"game {k}": k >= 30 for k in range(120)}
    base, _, final = read_json(reported / "results.json")
    write_json(folder / "results.json", [base, final | dict(successes=90, outcomes=wins)])
    return folder


def test_a_comparison_pairs_the_games_of_runs(reported, other, capsys):
    """Won by the first alone 30, by the other alone 15 (games 105 to 119): p = 0.036; nothing differs on the base."""
    assert main(["--report", str(reported), str(other)]) == 0
    path = reported.parent / "comparison.html"
    assert capsys.readouterr().out == f"{path}\n"
    page = path.read_text(encoding="ascii")
    is_one_accessible_page(page, 8)
    text = Outline(page).text
    (d, low, high), (_, _, same) = compare.paired_difference(75, 30, 15, 0), compare.paired_difference(21, 0, 0, 99)
    assert f"final other 120 30 15 {d:+.3f} [{low:+.3f}, {high:+.3f}] 0.0357 " in text and d == -0.125
    assert f"base other 120 0 0 +0.000 [-{same:.3f}, +{same:.3f}] 1 " in text and "phase 1 with skills other" not in text
    assert "lr 0.001 0.5 variant siri gigpo" in text and re.search(r"The other \d+ are the same", text)
    assert "finished: 0 at environment step 500, 0.625 at 3,000" in text and "other: 0 at second 60, 0.625 at 360" in text
    assert "finished: 0.175 at environment step 0, 0.875 at 3,000" in text           # evaluations, at what they cost


def test_a_comparison_says_why_there_is_no_test(reported, other):
    results = read_json(other / "results.json")
    results[0]["outcomes"] = {f"another {game}": won for game, won in results[0]["outcomes"].items()}
    results[1] |= dict(outcomes={"game 0": True, "game 119": True, "game x": True}, settings=dict(max_steps=5, seed=0))
    write_json(other / "results.json", results)
    first = read_json(reported / "results.json")
    first[2] |= dict(settings=dict(max_steps=9, seed=0))
    write_json(reported / "results.json", first)
    text = Outline(compare.page([reported, other])).text
    assert "base other other games (alfworld valid_seen, 120 games; alfworld valid_seen, 120 games): no paired test" in text
    assert "final other 2 of 120; not the same max_steps 0 1 +0.500 [" in text
    append_metrics(other, metrics_row(6, 2, seconds=math.nan, env_steps=1e300))              # no axis reaches there
    assert "0.625 at 3,000" in Outline(compare.page([reported, other])).text
    write_json(other / "results.json", [])
    assert "No other run has an evaluation that finished has: no paired test" in Outline(compare.page([reported, other])).text
    for name in ("results.json", "metrics.csv"):
        (other / name).unlink()
        (reported / name).unlink()
    text = Outline(compare.page([reported, other])).text
    assert "Nothing has been evaluated yet" in text and "not finished" in text and "No finite value" in text


def test_a_comparison_of_what_cannot_be_compared_is_refused(reported, tmp_path):
    for folders, said in (([reported, reported / ".." / "finished"], "given twice"), ([reported, tmp_path / "none"], "none/config.json"),
                          ([tmp_path / str(k) for k in range(9)], "at most 8")):
        with pytest.raises(UserError, match=said):
            compare.page(folders)


def test_a_comparison_takes_no_file_of_others(reported, other, capsys):
    page = reported.parent / "comparison.html"
    page.write_text("mine")
    assert main(["--report", str(reported), str(other)]) == 2
    assert "comparison.html: is another file; move it away" in capsys.readouterr().err and page.read_text() == "mine"
    page.unlink()
    assert [main(["--report", str(reported), str(other)]) for _ in range(2)] == [0, 0]


def test_colours_of_the_report_can_be_read():
    """WCAG contrast of every text colour on every background it stands on, tints at their fullest: 4.5 at least."""
    light, dark = (dict(re.findall(r"--(\w+): ([^;]+);", part)) for part in figures.STYLE.split("@media")[:2])
    rgb = lambda c: [int(x) for x in c.split()] if " " in c else [
        int((c[1:] if len(c) == 7 else "".join(x * 2 for x in c[1:]))[k:k + 2], 16) for k in (0, 2, 4)]
    linear = lambda x: x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
    luminance = lambda c: sum(w * linear(x / 255) for w, x in zip((0.2126, 0.7152, 0.0722), c))
    share = {name: float(a) + float(b) for name, a, b in re.findall(
        r"rgb\(var\(--(\w+)\) / calc\(([.\d]+) \+ ([.\d]+) \* var\(--a\)\)\)", figures.STYLE)}
    assert set(share) == {"blue", "orange"}
    for colours in (light, light | dark):
        for ground in (rgb(colours["bg"]), rgb(colours["card"])):
            tinted = [[a * (1 - share[t]) + b * share[t] for a, b in zip(ground, rgb(colours[t]))] for t in share]
            pairs = [(name, ground) for name in ("fg", "dim", "s0", "s1", "s2", "s3")] + [("fg", g) for g in tinted]
            for name, behind in pairs:
                low, high = sorted((luminance(rgb(colours[name])), luminance(behind)))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, behind)


def test_text_of_a_run_stays_text_in_its_report(reported):
    """Wherever a run has text, hostile text: the page has the same elements, and shows it without its control characters."""
    plain = written(reported)[1]

    def spoil(data):
        if isinstance(data, dict):
            return {(HOSTILE + k if k in ("pick_and_place_simple",) or k.startswith("game ") else k): v if k in
                    ("preset", "variant", "state", "rejected", "label") else spoil(v) for k, v in data.items()}
        if isinstance(data, list):
            return [spoil(v) for v in data]
        return HOSTILE + data if isinstance(data, str) and data else data

    for name in ("config.json", "results.json", "skills.json", "samples/0005.json"):
        write_json(reported / name, spoil(read_json(reported / name)))
    page, outline = written(reported)
    assert [tag for tag, _ in outline.elements] == [tag for tag, _ in plain.elements] and outline.faults == []
    assert {k for _, a in outline.elements for k in a} == {k for _, a in plain.elements for k in a}
    shown = "</style></title><script>alert('x')</script><img src=//e.example onerror=f()>&amp;\"'\ufffd[31m\ufffd\ufffd"
    for text in ("put a pen in shelf", "You see a pen 1.", "the task needs pen", "look on the desk first", "assets/tiny",
                 "finished", "pick_and_place_simple", "game 0", "household0-0/train/1", "alfworld valid_seen, 120 games", "desk"):
        assert shown + text in outline.text, text
    twin = reported.with_name(f"<b>{reported.name}")
    shutil.copytree(reported, twin)
    outline = Outline(compare.page([reported, twin]))
    assert outline.faults == [] and not outline.all("b") and not outline.all("img") and "script" not in dict(outline.elements)
    assert "<b>finished" in outline.text and shown + "desk" not in outline.text


@pytest.mark.parametrize("missing, said", [
    (("metrics.csv",), "metrics.csv is missing: this run has not finished an iteration"),
    (("results.json",), "nothing has been evaluated yet"),
    (("skills.json",), "There are no skills to show: skills.json is missing"),
    (("samples/0005.json", "samples/0005.txt"), "This run has no sample episodes yet"),
    (("metrics.csv", "results.json", "skills.json", "samples/0005.json", "samples/0005.txt"), "Iterations none yet"),
])
def test_a_report_of_a_young_run_names_what_is_missing(reported, missing, said):
    for name in missing:
        (reported / name).unlink()
    outline = written(reported)[1]
    assert said in outline.text and outline.faults == []
    assert ("not finished: running, or stopped" in outline.text) == ("results.json" in missing)


def test_a_report_of_warm_up_and_of_values_that_are_not_numbers(reported):
    write_json(reported / "skills.json", new_bank().to_json())
    (reported / "metrics.csv").unlink()
    for iteration in range(2):
        append_metrics(reported, metrics_row(iteration, 0, kl=math.nan, entropy=math.inf if iteration else 0.5))
    (reported / "results.json").write_text("[]")
    outline = written(reported)[1]
    assert "There are no skills to show: the run is in warm-up" in outline.text
    assert "No finite value in this run" in outline.text                   # KL
    assert "Entropy: 0.5 at iteration 0." in outline.text                  # the infinite one is a gap
    assert figures.chart("x", "x", "x", [figures.Series("x", [(0, 0.0, 0, 0)])], [], (0, 1)).count(">0.2</text>") == 1     # all 0: 0 to 1
    assert "results.json is missing or empty" in outline.text and outline.faults == []
    with (reported / "metrics.csv").open("a") as f:
        f.write("2,0,180.0,15")                                            # a crash in mid-line
    outline = written(reported)[1]
    assert "The last line of metrics.csv is torn" in outline.text and "(iterations: 2)" in outline.text


@pytest.mark.parametrize("name, content, said", [
    ("config.json", None, "cannot be read as JSON"), ("config.json", "[]", "did not write it so"),
    ("config.json", '{"env": "alfworld"}', "did not write it so"),
    ("metrics.csv", "a,b\r\n1,2\r\n", "has no column iteration"), ("metrics.csv", b"\xff\xfe\n", "cannot be read as CSV"),
    ("metrics.csv", "{header}1,two\r\n", "line 2 is not a row"), ("metrics.csv", "{header}\r\n", "line 2 is not a row"),
    ("metrics.csv", "{header}" + ",".join(["7"] * 19) + "\r\n", "impossible phase"),
    ("results.json", "{}", "did not write it so"), ("results.json", "[3]", "did not write it so"),
    ("results.json", '[{"label": "base"}]', "did not write it so"), ("results.json", "[", "cannot be read as JSON"),
    ("results.json", "more successes", "121 successes of 120 games"),
    ("skills.json", "{}", "kappa is missing"), ("skills.json", "nonsense", "cannot be read as JSON"),
    ("samples/0005.json", "{}", "did not write it so"), ("samples/0005.json", "a weight less", "tokens without a weight"),
])
def test_a_report_of_foreign_files_is_a_line_that_names_the_file(reported, name, content, said):
    path = reported / name
    if content is None:
        path.unlink()
    elif content == "more successes":
        write_json(path, [r | dict(successes=121) for r in read_json(path)])
    elif content == "a weight less":
        data = read_json(path)
        data["episodes"][0]["steps"][0]["weights"].pop()
        write_json(path, data)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        header = (reported / "metrics.csv").read_bytes().decode().splitlines(keepends=True)[0]
        assert header.count(",") == 18
        path.write_bytes(content.replace("{header}", header).encode())
    with pytest.raises(UserError, match=re.escape(said)) as error:
        report.write(reported)
    assert name in str(error.value) and "\n" not in str(error.value) and not (reported / "report.html").exists()


@slow
def test_the_report_fits_a_phone_and_a_desk(reported, other, tmp_path):
    """In a browser: no page scrolls sideways with every part unfolded, light or dark, and print unfolds what screens fold."""
    browser = os.environ.get("SIRI_CHROMIUM")
    if not browser:
        pytest.skip("set SIRI_CHROMIUM to a Chromium or Chrome to run it")
    data = read_json(reported / "samples/0005.json")
    data["episodes"][0]["steps"][0]["observation"] = "x" * 3000             # nothing to break at
    write_json(reported / "samples/0005.json", data)
    page = written(reported)[0]
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(page)}"></iframe>' for page in (page, compare.page([reported, other])) for w in (390, 1280))
    probe = tmp_path / "probe.html"
    probe.write_text(f"""<!DOCTYPE html><body>{frames}<pre></pre><script>onload = () => {{
        document.querySelector("pre").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(f => {{
            const d = f.contentDocument;
            const folded = d.querySelectorAll("details:not([open])").length;
            d.querySelectorAll("details").forEach(x => x.open = true);
            return [f.clientWidth, d.documentElement.scrollWidth, folded, d.querySelectorAll("figure svg").length]; }})); }}
        </script></body>""")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run([*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=60, check=True).stdout
    measured = json.loads(html.unescape(re.search(r"<pre>(\[\[.*?\]\])</pre>", dom)[1]))
    charts = page.count('class="chart"')
    assert all(content <= width for width, content, *_ in measured) and [m[0] for m in measured] == [390, 1280] * 2
    assert all(folded >= 4 and drawn >= charts for *_, folded, drawn in measured[:2])
    subprocess.run([*command, f"--print-to-pdf={tmp_path / 'page.pdf'}", (reported / "report.html").as_uri()], timeout=60,
                   capture_output=True, check=True)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


class PlayedShop:
    """Two commands and a search box; leaving wins. Its pages hold terminal codes."""
    name, scored, max_steps, notice = "alfworld", True, 5, "A cupboard.\x1b[2J"

    def tasks(self, split):
        return [envs.Task("t/1", "kind", "leave \x1b]0;title\x07the room", split)]

    def open(self, task):
        state = envs.State("a \x1b[31mroom", ("wait", "leave", "search[<your query>]"), "a")

        def step(before, action):
            won = action == "leave"
            return dataclasses.replace(before, observation=f"after {action}", steps=before.steps + 1, success=won,
                                       score=float(won), done=won or before.steps == 4, valid=action in ("wait", "leave"))
        return SimpleNamespace(task=task, start=state, step=step, close=lambda: None)


def played(monkeypatch, capsys, lines, env=None):
    monkeypatch.setattr(terminal, "make_environment", lambda cfg: env or PlayedShop())
    monkeypatch.setattr(terminal, "Policy", lambda cfg, checkpoint: tiny_policy())
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    terminal.command("", {"preset": "tiny"})
    return capsys.readouterr().out


def test_play_takes_numbers_and_words_and_ends_with_the_result(monkeypatch, capsys):
    out = played(monkeypatch, capsys, "1\n  LEAVE \n2\nfly\n9\n0\n3\nleave\n")
    assert re.findall(r"=== (.*), (\d) steps", out) == [
        ("success, score 1.00", "2"),                                       # wait, then leave in words
        ("success, score 1.00", "1"),                                       # leave by its number
        ("success, score 1.00", "2")]                                       # fly costs a step, 9, 0 and 3 none
    assert out.count("not a command that can be done here") == 1
    assert "there is no command 9: 1 to 3" in out and "there is no command 0: 1 to 3" in out
    assert "write it out, with words of your own: search red shoes" in out
    assert out.count("=== t/1") == 4                                        # the fourth game meets the end of the input


def test_play_sends_no_codes_to_the_terminal(monkeypatch, capsys):
    out = played(monkeypatch, capsys, "search \x1b[5m\nq\n")
    assert "after search" in out and [c for c in out if not c.isprintable() and c != "\n"] == []


def test_play_shows_the_policys_prompt_and_thoughts(monkeypatch, capsys):
    """`p` is the very prompt of `fit_prompt`; `h` asks and plays nothing; `w` plays on with what the policy says, by its number."""
    answers = iter(["<think> why not </think> <action> wait </action>",
                    "<think> enough \x1b[0m</think> <action> leave </action>"] * 2)
    policy = tiny_policy()
    monkeypatch.setattr(policy, "generate", lambda prompts, temperature, max_new, dice: [[7]])
    monkeypatch.setattr(policy, "decode", lambda ids: next(answers))
    out = played(monkeypatch, capsys, "?\np\nh\nh\nw\nn\nq\n")
    world = PlayedShop()
    task = world.tasks("valid_seen")[0]
    game = world.open(task)
    prompt = policy.tokenizer.decode(siri.fit_prompt(policy, siri.Episode(task, None, state=game.start), None))
    assert figures.printable(prompt) in out and "<|im_start|>" in prompt and "the room" in prompt
    assert out.count("the policy: <think> why not </think> <action> wait </action>") == 2
    assert "enough \ufffd[0m</think>" in out and "=== success, score 1.00, 2 steps" in out
    assert "</action>\n> 1\n" in out and "</action>\n> 2\n" in out         # wait and leave, as they are numbered for a person
    assert out.count(terminal.HELP) == 2 and out.count(terminal.AFTER) == 1
    assert out.count("[0 of 5]") == 2 and out.count("[1 of 5]") == 1        # h moved nothing; w went two steps; then a new game
    waited = siri.Step([], [], "", "wait", game.start.observation, "", None)
    later = siri.Episode(task, None, [waited], game.step(game.start, "wait"))
    later = policy.tokenizer.decode(siri.fit_prompt(policy, later, None))
    assert figures.printable(later) in played(monkeypatch, capsys, "wait\np\n")


@pytest.mark.parametrize("env, first", [("alfworld", "2"), ("webshop", "search lamp")])
def test_play_plays_both_benchmarks_with_a_real_policy(monkeypatch, capsys, env, first):
    cfg = resolve({"preset": "tiny", "env": env})[0]
    policy = Policy(cfg)
    monkeypatch.setattr(terminal, "Policy", lambda cfg, checkpoint: policy)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{first}\np\nw\n"))
    terminal.command("", {"preset": "tiny", "env": env})
    out = capsys.readouterr().out
    assert re.search(r"=== (success|not solved).*, \d+ steps", out) and "GENERATED" in out
    assert len(re.findall("the policy: <think>", out)) == int(re.search(r", (\d+) steps", out)[1]) - 1 > 0


@pytest.mark.parametrize("observation", ["text", "text_rich"])
def test_play_lays_a_shops_pages_out(observation):
    """Every button has one number, and that number does what the button says; what is not for a person is left out."""
    env = envs.WebShop(envs.Shop.generated(0, 450, tagger="stop-list"), "made up", observation=observation)
    task = env.tasks("train")[0]
    game = env.open(task)
    state, pages = game.start, []
    for action in ("search[sofa]", "click[haven44]", "click[features]", "click[< prev]", "click[pink]", "click[buy now]", ""):
        text, actions = terminal.page(state, task.goal)
        assert sorted([*actions, *[terminal.SEARCH] * (not pages)]) == sorted(state.admissible)
        for number, label in re.findall(r"\[(\d+)\] (.*?)(?=  |\n|$)", text):
            assert actions[int(number) - 1] == f"click[{label.lower()}]"
        assert len(re.findall(r"\[\d+\]", text)) == len(actions) and task.goal not in text and "SEP" not in text
        pages.append(text)
        state = game.step(state, action) if action else state
    start, results, product, about, _, chosen, bought = pages
    assert start == "--- WebShop ---\n[1] Search" and results.startswith("--- Page 1 (Total results: 10) ---\n  [1] ")
    assert "  size  [4] medium  [5] large  [6] huge\n" in product and product.startswith("--- Haven Sofa ---")
    assert about.startswith("--- About the product ---\n  For every day\n  ") and bought == "--- Thank you for shopping with us! ---"
    assert ("You have clicked pink." in chosen) == (observation == "text_rich")
    assert [terminal.meaning(line, ["click[search]"]) for line in ("search Red  shoes", "search[sofa]", "1", "search")] == [
        "search[red shoes]", "search[sofa]", "", ""]


def test_a_run_is_watched_until_one_wants_to_play(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(terminal, "latest_checkpoint", lambda run: run / "checkpoints" / "iter-00001")
    monkeypatch.setattr(terminal, "load_config", lambda run, given: config())
    policy = tiny_policy()
    monkeypatch.setattr(policy, "generate", lambda prompts, temperature, max_new, dice: [[7]])
    monkeypatch.setattr(policy, "decode", lambda ids: "<think> go </think> <action> leave </action>")
    monkeypatch.setattr(terminal, "make_environment", lambda cfg: PlayedShop())
    monkeypatch.setattr(terminal, "Policy", lambda cfg, checkpoint: policy)
    monkeypatch.setattr("sys.stdin", io.StringIO("\nwhat\nn\n1\n2\nq\n"))      # another one; no command; then a game of one's own
    terminal.command(str(tmp_path), {})
    out = capsys.readouterr().out
    assert re.findall(r"=== (.*), (\d) steps", out) == [("success, score 1.00", "1")] * 2 + [("success, score 1.00", "2")]
    assert out.count("the policy: <think>") == 2 and out.count(terminal.AFTER) == 3


def test_play_on_a_machine_that_fails_ends_with_its_mend(monkeypatch):
    monkeypatch.setattr(envs.AlfWorld, "engines", [])
    monkeypatch.setattr(envs._textworld().fd, "load_lib", lambda: (_ for _ in ()).throw(OSError("failed to map segment")))
    with pytest.raises(UserError, match="failed to map segment.*TMPDIR"):
        terminal.command("", {"preset": "tiny"})


def test_play_with_a_run_needs_its_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        terminal.command(str(tmp_path), {})

# ---- 3. a run taken home ---------------------------------------------------------------------------------------------


def checkpointed(folder, policy, **progress):
    """The folder with the policy's settings and a checkpoint, as a run of it has them."""
    policy.cfg.base = policy.base
    (folder / "checkpoints").mkdir(parents=True)
    write_json(folder / "config.json", dataclasses.asdict(policy.cfg))
    bank = skills.SkillBank.from_json(read_json(folder / "skills.json")) if (folder / "skills.json").exists() else new_bank()
    save_checkpoint(folder, learner_of(policy, optimizer=make_optimizer(policy), bank=bank,
                                       progress=siri.Progress(**{"iteration": 6, "phase": 2, "milestones": 3, **progress})))
    return folder


@pytest.fixture
def home_run(reported):
    return checkpointed(reported, tiny_policy())


def exported(run, to, *flags):
    assert main(["--export", str(run), "--to", str(to), *flags]) == 0
    return to


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("kind", ["tiny", "stranger"])
def test_what_is_taken_home_answers_as_the_policy(tmp_path, monkeypatch, capsys, request, kind, merge):
    """By the card's own program, which imports transformers and peft only: the same greedy tokens, and the same log-probabilities up to
    the rounding of a merge. The stranger's base has padded rows that shout and a generation_config that asks for another distribution."""
    overrides = dict(name="x", eval_temperature=0.0, max_response=8)
    if kind == "tiny":
        cfg = resolve({"preset": "tiny", **overrides})[0]
    else:
        cfg = stranger_config(request.getfixturevalue("stranger_folder"), **overrides)
    policy = awake(Policy(cfg))
    run = checkpointed(tmp_path / "x", policy)
    to = exported(run, tmp_path / "out", *["--merge"] * merge)
    program = re.search(r"```python\n(.*?)```", card_of(to), re.S)[1]
    imported = {node.module for node in ast.walk(ast.parse(program)) if isinstance(node, ast.ImportFrom)}
    assert imported == ({"transformers"} if merge else {"transformers", "peft"}) and "import torch" not in program
    monkeypatch.chdir(to)
    said = {}
    for text, here in (("...", "look look "), ("assets/tiny", str(HERE / "assets/tiny")), ("bfloat16", "float32")):    # as the policy has it
        program = program.replace(f'"{text}"', f'"{here}"')
    exec(program, said)
    prompts, model, tokenizer = [policy.encode("look " * n) for n in (2, 1, 5, 9, 14)], said["model"], said["tokenizer"]
    expected = policy.generate(prompts, 0.0, cfg.max_response)
    assert said["asked"]["input_ids"][0].tolist() == prompts[0] and len({*map(tuple, expected)}) > 1
    ends = {} if kind == "tiny" else dict(stop_strings=["</action>", "</skill>"], tokenizer=tokenizer)
    for prompt, answer in zip(prompts, expected):
        ids = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=int), **ends)[0, len(prompt):].tolist()
        assert ids == answer
    rows = some_rows(policy)
    theirs = [model(input_ids=torch.tensor([[*r.prompt, *r.response]])).logits[0, len(r.prompt) - 1:-1, :policy.vocab].log_softmax(-1)
              .gather(-1, torch.tensor(r.response)[:, None])[:, 0] for r in rows]
    torch.testing.assert_close(torch.cat(theirs), policy.logprobs(rows)[0], rtol=1e-4, atol=1e-4)


def test_a_merge_is_rounded_once_to_the_precision_of_its_base(tmp_path):
    from safetensors.torch import load_file
    write_model(tmp_path / "base").bfloat16().save_pretrained(tmp_path / "base")
    policy = awake(Policy(stranger_config(tmp_path / "base", name="x")))
    saved = load_file(exported(checkpointed(tmp_path / "x", policy), tmp_path / "out", "--merge") / "model.safetensors")
    layer = policy.model.get_base_model().model.layers[1].mlp.up_proj
    added = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16} and added.abs().max() > 0.01
    expected = (layer.base_layer.weight.float() + added).bfloat16().cpu()
    torch.testing.assert_close(saved["model.layers.1.mlp.up_proj.weight"], expected, rtol=2**-8, atol=0)


def test_the_model_card_says_what_the_files_say(home_run, tmp_path):
    from huggingface_hub import ModelCard
    add_result(home_run, evaluation(HOSTILE, 6, 30, 120, notice=HOSTILE, temperature=0.4, versions={"torch": "2.0|"}))
    page = card_of(exported(home_run, tmp_path / "out"))
    data = ModelCard(page).data
    assert (data.library_name, data.license, data.base_model) == ("peft", "other", None) and "lora" in data.tags
    assert "its scores are not benchmark scores" in page and "<script" not in page and "\x1b" not in page and "\u202e" not in page
    rows = [re.split(r" (?<!\\)\| ", line) for line in re.findall(r"^\| (.*?) \|$", page.partition("## Results")[2].partition("## Use")[0], re.M)]
    lo, hi = wilson(105, 120)
    assert {len(row) for row in rows} == {8} and ["final", "yes"] in [row[:2] for row in rows] and ["base", "no"] in [row[:2] for row in rows]
    assert f"0.875 [{lo:.3f}, {hi:.3f}]" in page
    assert "after 6 iterations (warm-up 2, mining 2, internalize 2)" in page and "--max-lora-rank 16" in page
    assert envs.PROMPTS["alfworld", "compact"] in page


def test_the_card_names_a_base_on_the_hub_and_the_licence_of_its_folder(monkeypatch, tmp_path):
    import yaml
    offline(monkeypatch)
    run = SimpleNamespace(cfg=config(model="some/model"))
    base = SimpleNamespace(on_hub=True, source="some/model")
    front = yaml.safe_load(export.front_matter(run, base, merge=False))
    assert front["base_model"] == "some/model" and front["base_model_relation"] == "adapter" and front["license_name"] == "see-the-base-model"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: so\nlicense_link: https://e.x/y\ntags: [a]\n---\nlicense: mit\n")
    assert export.licence(SimpleNamespace(source=str(tmp_path))) == dict(license="other", license_name="so", license_link="https://e.x/y")


def test_skills_and_samples_go_along_one_a_line(home_run, tmp_path):
    sample = read_json(home_run / "samples/0005.json")
    sample["episodes"][0]["steps"][0]["advantage"] = math.nan
    write_json(home_run / "samples/0005.json", sample)
    to = exported(home_run, tmp_path / "out")
    lines = {name: [json.loads(line, parse_constant=pytest.fail) for line in (to / f"{name}.jsonl").read_text().splitlines()]
             for name in ("skills", "trajectories")}
    bank = skills.SkillBank.from_json(read_json(home_run / "skills.json"))
    assert [(s["condition"], s["strategy"], s["state"], s["pairings"], s["utility"], s["stderr"]) for s in lines["skills"]] == [
        (s.condition, s.strategy, s.state, s.n, s.utility(1.0), s.stderr(1.0)) for s in bank.skills]
    assert len(lines["trajectories"]) == len(sample["episodes"]) == 2
    guided, plain = lines["trajectories"]
    assert (guided["skill"], guided["phase"], plain["skill"], plain["success"]) == (bank.skills[0].text, "internalize", None, True)
    assert [s["action"] for s in plain["steps"]] == ["go to desk 1", "look"] and guided["steps"][0]["advantage"] is None
    told = (HERE / "docs/export.md").read_text().partition("## What is in it")[2]
    names = {name for line in lines["skills"] + lines["trajectories"] + plain["steps"] for name in line}
    assert names <= set(re.findall(r"`(\w+)`", told))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken_home(home_run, tmp_path, capsys):
    save_checkpoint(home_run, learner_of(tiny_policy(), optimizer=make_optimizer(tiny_policy()), progress=siri.Progress(7, 2, milestones=3)))
    (home_run / "checkpoints/00007-2/adapter_model.safetensors").write_bytes(b"")
    to = exported(home_run, tmp_path / "out")
    told = capsys.readouterr()
    assert "00007-2 cannot be used" in told.err and "00006-2" in told.out and "Checkpoint 00006-2" in card_of(to)


@pytest.mark.parametrize("flags, spoil, said", [
    ("--to full", lambda cwd, run: (cwd / "full/x").mkdir(parents=True), "full: is there already"),
    ("--to link", lambda cwd, run: (cwd / "link").symlink_to(cwd), "link: is there already"),
    ("--to a/b", None, "a is not there"), ("--to finished/out", None, "in the run's own folder"), ("", None, "add --to FOLDER"),
    ("--to out --seed 1", None, "--seed: --export takes no settings but --model"),
    ("--to out --model elsewhere", None, "could not be read"),
    ("--to out --model assets/tiny-webshop", None, "is another base model"),
    ("--to out", lambda cwd, run: (cwd / "out.writing").mkdir(), "out.writing: is there"),
    ("--to out", lambda cwd, run: (run / "skills.json").symlink_to("x") if (run / "skills.json").unlink() is None else 0, "is a link"),
    ("--to out", lambda cwd, run: (run / "checkpoints/00006-2/manifest.json").unlink(), "no sound checkpoint"),
    ("--to out", lambda cwd, run: (run / "config.json").write_text('{"lora_r": "x"}'), "lora_r")])
def test_what_cannot_be_taken_home_is_one_line(home_run, tmp_path, monkeypatch, capsys, flags, spoil, said):
    offline(monkeypatch)
    monkeypatch.chdir(tmp_path)
    if spoil:
        spoil(tmp_path, home_run)
    before = sorted(tmp_path.iterdir())
    assert main(["--export", str(home_run), *flags.split()]) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1] and err.startswith("siri: ") and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("flags", ["--to x", "--merge", "--eval runs/x --merge"])
def test_the_options_of_an_export_are_refused_elsewhere(flags, capsys):
    assert main(flags.split()) == 2 and "only together with --export RUN" in capsys.readouterr().err


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_a_full_disk_leaves_nothing_half_written(home_run, tmp_path, monkeypatch, capsys, merge):
    """Before it is written, if the room is too little by then; or by a limit of file size, as when it fills meanwhile."""
    import resource
    import shutil
    flags = ["--export", str(home_run), "--to", str(tmp_path / "out"), *["--merge"] * merge]
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**26))
        assert main(flags) == 2 and "are free; make room" in capsys.readouterr().err
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
        status = main(flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "File too large" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["finished"]


def test_a_run_in_four_bits_says_what_it_was_merged_into(home_run, tmp_path, capsys):
    write_json(home_run / "config.json", read_json(home_run / "config.json") | dict(four_bit=True))
    capsys.readouterr()
    page = card_of(exported(home_run, tmp_path / "whole", "--merge"))
    assert export.UNQUANTISED in capsys.readouterr().out and export.UNQUANTISED in page
    page = card_of(exported(home_run, tmp_path / "adapter"))
    assert "quantised = BitsAndBytesConfig(load_in_4bit=True, " in page and "quantization_config=quantised" in page and export.UNQUANTISED not in page


def test_a_base_with_an_adapter_of_its_own_is_taken_home_merged(home_run, tmp_path, capsys):
    run = export.read_run(home_run, None)
    (tmp_path / "adapter_config.json").write_text("{}")
    base = dataclasses.replace(export.read_base(run.cfg), source=str(tmp_path))
    with pytest.raises(UserError, match="an adapter of its own.*add --merge"):
        export.refuse(tmp_path / "out", run, base, merge=False)
    export.refuse(tmp_path / "out", run, base, merge=True)

# ---- 4. the lessons --------------------------------------------------------------------------------------------------


LESSONS = sorted(HERE.glob("notebooks/*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in cell.outputs)


def first_cell():
    """What every notebook begins with."""
    return "".join(next(cell for cell in json.loads(LESSONS[0].read_text())["cells"] if cell["cell_type"] == "code")["source"])


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_notebook_can_be_read_without_running_it(path):
    import nbformat
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))          # run once, from the top
    assert all(sum(map(bool, cell.source.splitlines())) <= 15 for cell in cells) and path.stat().st_size < 600_000
    outputs = [o for cell in cells for o in cell.outputs]
    assert all(o.output_type != "error" and o.get("name") != "stderr" for o in outputs)
    assert any("image/png" in o.get("data", {}) for o in outputs) or path.stem == "solutions"
    assert not re.search(r"fontsize=[0-8]\b", "".join(cell.source for cell in cells))         # 9 points or more
    assert all(f"**{word}:**" in notebook.cells[0].source for word in ("Goals", "Time", "You need"))
    assert cells[0].source == first_cell()
    assert any("exact" in cell.metadata.get("tags", []) for cell in cells)


@pytest.mark.skipif(not os.environ.get("SIRI_NOTEBOOKS"), reason="takes minutes: set SIRI_NOTEBOOKS=1 to run it")
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_the_modules_hold_now(path):
    """From top to bottom without an error; cells with the tag `exact` print what is committed, to the letter."""
    import nbclient
    import nbformat
    before = nbformat.read(path, 4)
    after = nbclient.NotebookClient(copy.deepcopy(before), timeout=900, resources={"metadata": {"path": str(HERE)}}).execute()
    for old, new in zip(code_cells(before), code_cells(after)):
        if "exact" in old.metadata.get("tags", []):
            assert text_of(new) == text_of(old), old.source


@pytest.fixture
def restored(monkeypatch):
    """What the first cell changes is as it was, afterwards."""
    import matplotlib
    monkeypatch.chdir(HERE)
    monkeypatch.setattr("sys.path", [*sys.path])
    threads = torch.get_num_threads()
    with matplotlib.rc_context():
        yield
    torch.set_num_threads(threads)


def test_the_first_cell_finds_the_repository_from_below(restored, monkeypatch, tmp_path):
    monkeypatch.chdir(HERE / "assets" / "tiny-run")
    exec(first_cell(), found := {})
    assert found["root"] == HERE == Path.cwd() and sys.path[0] == str(HERE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="open this notebook in a folder of the repository"):
        exec(first_cell(), {})


def test_in_colab_the_first_cell_clones_once_and_keeps_its_torch(restored, monkeypatch, tmp_path):
    calls = []

    def called(command, check):
        calls.append(command)
        if command[0] == "git":
            Path(command[-1]).symlink_to(HERE)

    monkeypatch.setattr(subprocess, "run", called)
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    for _ in range(2):                                                      # the second time as after a restart of the kernel
        monkeypatch.chdir(tmp_path)
        exec(first_cell(), {})
    assert [command[0] for command in calls] == ["git", sys.executable, sys.executable] and Path.cwd() == HERE
    pip = calls[1][5:]
    assert f"torch=={torch.__version__}" in pip and len([name for name in pip if re.match(r"torch\b", name)]) == 1
    assert {"transformers", "alfworld"} <= {re.split("[<>=]", name)[0] for name in pip} and not any("#" in name for name in pip)


def checks(path):
    """The exercises that a notebook checks, and what it printed of each."""
    import nbformat
    said = [(name, text_of(cell)) for cell in code_cells(nbformat.read(path, 4)) for name in re.findall(r'check\("(.*?)"', cell.source)]
    return {name: re.findall(rf"^{name}: (.*)$", text, re.M) for name, text in said}


def test_every_exercise_is_asked_once_and_solved():
    *lessons, solutions = LESSONS
    asked = {name: (path.stem[0], said) for path in lessons for name, said in checks(path).items()}
    assert list(asked) == list(exercises.EXERCISES) == list(checks(solutions))
    assert all(name.split(".")[0] == lesson and said == ["not yet"] for name, (lesson, said) in asked.items())
    assert all(said == ["right"] for said in checks(solutions).values())
    code = [name for name, exercise in exercises.EXERCISES.items() if exercise.inputs]
    assert [lesson for lesson in "123456" if sum(name.startswith(lesson) for name in code) >= 2] == list("1234")


@pytest.mark.parametrize("name, answer", [
    ("1.4", lambda prompt, response: [token in response for token in prompt + response]),           # by looks
    ("1.5", lambda keys: [[sorted({k for row in keys for k in row}).index(k) for k in row] for row in keys]),
    ("2.4", lambda returns: (returns - returns.mean()) / (returns.std() or 1)),                       # biased
    ("2.5", lambda rewards, gamma: [sum(rewards[t:]) for t in range(len(rewards))]),                  # undiscounted
    ("3.4", lambda group: sum(won if guided else -won for guided, won in group) / (len(group) / 2)),  # halves taken as equal
    ("3.5", lambda effects, kappa: sum(effects) / max(len(effects), 1)),                              # not shrunk
    ("4.4", lambda is_action, used, utility, delta: [used and utility >= 0 and delta > 0 and token for token in is_action]),
    ("4.5", lambda logp, weight, gate: -(weight * logp * gate).sum() / (gate * weight).sum().clamp(min=1)),
    ("2.1", 6.25 / (187.5 / 8) ** 0.5)])
def test_a_checker_finds_the_usual_mistakes(capsys, name, answer):
    exercises.check(name, answer)
    exercises.check(name, lambda *given: 1 / 0)
    wrong, raises = capsys.readouterr().out.splitlines()
    assert wrong == f"{name}: wrong; hint: {exercises.EXERCISES[name].hint}"
    assert raises.startswith(f"{name}: wrong: it raises ")


def test_a_class_copy_has_no_outputs_and_no_answers(tmp_path):
    folder = tmp_path / "class"
    command = [sys.executable, HERE / "tools/class_copy.py", folder]
    done = subprocess.run([*command, "--repository", "https://example.org/ours.git"], capture_output=True, text=True)
    assert done.stdout == f"6 notebooks without outputs and answers: {folder}\n" and done.returncode == 0
    assert [path.name for path in sorted(folder.iterdir())] == [path.name for path in LESSONS if path.stem != "solutions"]
    for path in LESSONS[:-1]:
        import nbformat
        copied, whole = nbformat.read(folder / path.name, 4), nbformat.read(path, 4)
        nbformat.validate(copied)
        assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(copied))
        answers = [cell for cell in whole.cells if "answer" in cell.metadata.get("tags", [])]
        left = [cell.id for cell in copied.cells]
        assert answers and left == [cell.id for cell in whole.cells if cell not in answers]
        for cell in answers:                # no question, formula or heading goes with them, but those of the last section
            assert not re.search(r"\*\*Predict:|\$\$|^## (?!What the module has)", cell.source, re.M), cell.id
        assert 'REPOSITORY = "https://example.org/ours.git"' in code_cells(copied)[0].source
        text = "\n".join(cell.source for cell in copied.cells)
        assert not any(line in text for cell in answers for line in cell.source.splitlines() if len(line) > 40)
        code = re.findall(r"(?<=def )(\w+)\(.*\n    \"\"\"(?:.|\n)*?\"\"\"\n(.*)\n\ncheck", text)
        assert {body for _, body in code} <= {"    ..."} and len(code) == (2 if path.stem[0] in "1234" else 0)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stderr.startswith(f"siri: {folder} is there already") and again.returncode == 1


# ---- 5. What the documentation promises ------------------------------------------------------------------------------


README = (HERE / "README.md").read_text()
PAGES = [HERE / "README.md", *sorted(HERE.glob("docs/*.md"))]
COMMANDS = [line.strip() for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text().replace("\\\n", " "), re.S)
            for line in re.split(r"\n|&&", block) if line.strip() and not line.strip().startswith("#")]
MODULES = ("gigpo", "skills", "distill", "envs", "decode", "policy", "siri", "run")


@pytest.mark.parametrize("module", [gigpo, distill, skills, envs, ranks, siri, metrics, figures, compare, export, progress, lines], ids=lambda module: module.__name__)
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("name", ["gigpo", "distill", "skills"])
def test_the_mathematics_is_pure(name):
    """No imports of the other modules, no files, no printing, no clocks, no hidden random numbers."""
    tree = ast.parse((HERE / f"{name}.py").read_text())
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names} | {node.module.split(".")[0] for node in ast.walk(tree)
                                            if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "collections", "dataclasses", "difflib", "math", "numpy", "re", "textwrap",
                        "torch", "typing"}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"open", "print", "input", "eval", "exec"}
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))


def imports_of(path):
    """The project's own modules that a file imports, at any depth but under `if __name__ == "__main__"`."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.dump(node.test))]
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    own = {*MODULES, *(f"tools.{p.stem}" for p in HERE.glob("tools/*.py"))}
    return {name for name in names if name in own}


def test_every_room_imports_only_what_is_below_it():
    """No circle: the method knows neither run nor tools, the policy no SIRI, the mathematics nothing of the house."""
    floors = [{"gigpo", "skills", "distill", "envs", "decode"}, {"policy"}, {"siri"}, {"tools.metrics", "tools.files", "tools.check", "tools.worlds", "tools.gym_text"},
              {"tools.settings"}, {"tools.report", "tools.play", "tools.exercises", "tools.bench", "tools.probe", "tools.imitation", "tools.progress", "tools.track"}, {"tools.compare", "tools.export"}, {"run"}]
    below = {"tools.figures", "tools.oracle", "tools.terminal", "tools.limits", "tools.ranks", "tools.lesson", "tools.class_copy"}                     # of which nothing of the house is used but envs
    for floor in floors:
        for name in floor:
            assert imports_of(HERE / f"{name.replace('.', '/')}.py") <= below, name
        below |= floor
    assert imports_of(HERE / "policy.py") == {"gigpo", "decode", "tools.limits", "tools.ranks", "tools.terminal"}
    assert imports_of(HERE / "tools/ranks.py") == {"tools.terminal"}
    method = ast.parse((HERE / "siri.py").read_text())
    method.body = [node for node in method.body if not (isinstance(node, ast.If) and "__name__" in ast.dump(node.test))]
    names = {node.id for node in ast.walk(method) if isinstance(node, ast.Name)}
    names |= {alias.name for node in ast.walk(method) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not names & {"open", "print", "Path", "pathlib", "os", "json", "tqdm", "shutil"}


@pytest.mark.parametrize("name", ["siri", "policy", "tools/ranks", "run"])
def test_no_function_is_longer_than_a_screen(name):
    functions = [n for n in ast.walk(ast.parse((HERE / f"{name}.py").read_text())) if isinstance(n, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_the_pages_of_settings_and_columns_are_complete(runs):
    assert (HERE / "docs/settings.md").read_text() == settings.page()
    columns = {*run_metrics(runs[0])[0], "score_plain", "score_plain_se", "score_skill", "score_skill_se"}
    told = (HERE / "docs/glossary.md").read_text().partition("## The columns")[2]
    assert columns == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", told, re.M))))


def test_the_readme_has_the_command_that_trains_and_the_one_that_tests():
    assert any(command.startswith("python siri.py --env alfworld") for command in COMMANDS)
    assert re.search(r"^python -m pytest.*$", README, re.M)                    # the line that .ci/run takes from there


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_are_valid(command):
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"\w+=\S*", word)]
    for word in words[1:]:
        assert not re.fullmatch(r"[\w/]+\.(py|txt|ipynb|md)", word) or (HERE / word).exists(), word
    if words[0] in ("python", "torchrun") and "siri.py" in words and "--help" not in words:
        chosen, given = parse_arguments(words[words.index("siri.py") + 1:])
        if not (chosen.eval or chosen.resume or given.get("preset", "").startswith("paper")):
            resolve(given)


@pytest.mark.parametrize("file", ["bench.json", "bench-cuda.json"])
def test_the_performance_tables_are_those_of_the_files(file):
    measured = json.loads((HERE / "assets" / file).read_text())
    assert not measured["quick"] and bench.markdown(measured) in (HERE / "docs/performance.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_on_a_page_exist(page):
    """Files, functions, tests and flags in back-quotes; links to other pages."""
    options = {flag(field.name) for field in dataclasses.fields(siri.Config)} | {"help", *map(flag, ACTIONS)}
    tests = {name for path in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    for name in re.findall(r"`([^`\n]+)`", page.read_text()):
        if match := re.fullmatch(rf"({'|'.join(MODULES)})\.(\w+)(\.\w+)?(\(.*\))?", name):
            assert match[2] in ("py", "json", "jsonl") or hasattr(importlib.import_module(match[1]), match[2]), name
        if re.fullmatch(r"test_\w+", name):
            assert name in tests, name
        if re.fullmatch(r"[\w./-]+\.(py|txt|ipynb)", name):
            assert (HERE / name).exists(), name
        if match := re.fullmatch(r"--(no-)?([a-z0-9-]+)( .*)?", name):
            assert match[2] in options, name
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_line_counts_of_the_rooms_are_about_right():
    counts = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (HERE / "docs/contributing.md").read_text(), re.M)
    assert {name for name, _ in counts} == {f"{name}.py" for name in MODULES}
    for name, told in counts:
        assert int(told) == pytest.approx(len((HERE / name).read_text().splitlines()), rel=0.05), name


def test_the_readme_is_short_and_nothing_in_it_is_cut_off():
    """Prose of at most 120 columns; code of at most 100, which a page of 1,280 pixels shows whole."""
    assert len(README.split()) <= 1900
    for i, block in enumerate(README.split("```")):
        for line in block.splitlines():
            assert len(line) <= (100 if i % 2 else 120) or line.startswith(("|", "![")), line


def test_the_readmes_hours_are_those_that_were_measured():
    """Of the preset's 150 iterations, on the card of the file."""
    told = {r["what"]: r["ours"]["median"] for r in json.loads((HERE / "assets/bench-cuda.json").read_text())["rows"]}
    for card, row in (("24 GB, 4-bit", "`paper`"), ("48 GB, bf16", "`paper48`")):
        load, hours = told[f"{card}: load and fit"], told[f"{card}: iteration of 50 steps, 1,000 + 150 tokens"]
        line = next(line for line in README.splitlines() if f"| {row} |" in line)
        assert line.endswith(f"| {load:.0f} s | {hours:.2f} h | {150 * hours:.0f} h |")


def test_links_to_headings_lead_somewhere():
    heading = lambda text: re.sub(r"[^\w -]", "", text.strip().lower()).replace(" ", "-")
    there = {page: {heading(text) for text in re.findall(r"^#+ (.*)$", page.read_text(), re.M)} for page in PAGES}
    for page in PAGES:
        for file, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", page.read_text()):
            assert anchor in there[(page.parent / file).resolve() if file else page], (page.name, anchor)


def test_the_equations_of_the_readme_name_function_and_test():
    rows = re.findall(r"^\| ([GS]\d+) \|.*\[`(\w+)\.(\w+).*`\]\((\w+)\.py\)<br>`test_", README, re.M)
    assert all(module == file and hasattr(importlib.import_module(module), name) for _, module, name, file in rows)
    assert [tag for tag, *_ in rows] == [f"G{i}" for i in range(1, 9)] + [f"S{i}" for i in range(1, 11)]


# ---- 8. the probe of a model -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", ["alfworld", "webshop"])
def test_a_probe_says_how_much_of_a_models_answers_can_be_used(monkeypatch, capsys, world):
    monkeypatch.setattr(probe, "STATES", 8)
    monkeypatch.setattr(probe, "WINS", 4)
    assert main(["--probe", "--preset", "tiny", "--env", world]) == 0
    out = capsys.readouterr().out
    found = re.search(r"answers: parsable (\S+), admissible (\S+) of 16; (\d+) tokens each, (\d+) cut at --max-response 24; \d+ s\n"
                      r"skills: well formed (\S+) of 4", out)
    parsable, admissible, tokens, cut, formed = map(float, found.groups())
    assert 0.6 < admissible <= parsable <= 1 and 5 < tokens < 24 and formed > 0.4
    assert out.count("--- answer") == out.count("--- skill") == 3


def test_a_probe_counts_what_a_model_says(monkeypatch):
    """Scripted answers: right, not on offer, without a thought, none at all; and skills that are refused for their form."""
    cfg = resolve(dict(preset="smoke"))[0]
    env = make_environment(cfg)
    policy = Policy(cfg)
    script = ["<think>x</think><action>{}</action>", "<think>x</think><action>fly</action>", "<action>{}</action>", "hm"]
    monkeypatch.setattr(policy, "answer", lambda ids: ids)
    monkeypatch.setattr(siri, "fit_prompt", lambda policy, e, skill: e.state.admissible[0])
    monkeypatch.setattr(policy, "generate", lambda prompts, *_: [script[k % 4].format(p) for k, p in enumerate(prompts)])
    steps, _ = probe.ask(policy, env, 4, 2)
    assert (steps["n"], steps["parsable"], steps["admissible"]) == (8, 4, 2)
    said = iter(["<skill>when a b -> do c</skill>", "<skill>when b00x2 -> c</skill>", "no", "<skill>when d -> e</skill>"])
    monkeypatch.setattr(policy, "generate", lambda prompts, *_: [next(said) for _ in prompts])
    mined, _ = probe.mine(policy, env, 4)
    assert mined["well formed"] == 2 and mined["instance_specific"] == 1 and mined["unparsable"] == 1


@pytest.mark.parametrize("world", ["alfworld", "webshop"])
def test_the_ways_that_are_known_win(world):
    env = make_environment(resolve(dict(preset="tiny", env=world))[0])
    won = 0
    for task in [env.tasks("train")[i] for i in range(10)]:
        with env.open(task) as game:
            state = game.start
            for action in winning_actions(env, task):
                state = game.step(state, action)
            won += state.success
    assert won >= 9


# ---- 9. a cold start ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("opening", ["", "<think>\n", "<think>\n\n</think>\n\n"])
def test_an_answer_to_imitate_is_one_that_is_played(stranger_folder, tmp_path, opening):
    """Also where the chat template has begun it: with a thought that is open, or an empty one."""
    template = CHATML.replace("assistant\n{%", "assistant\n" + opening + "{%")
    write_model(tmp_path, template=template)
    policy = Policy(stranger_config(tmp_path))
    ids, text = imitation.answer(policy, "go to desk 1")
    assert policy.answer(ids) == opening + text and text.endswith("</action>") and policy.answer(ids).count("<think>") == 1
    assert envs.parse_action(policy.answer(ids)) == "go to desk 1"


def test_a_base_that_wins_nothing_imitates_and_one_that_wins_does_not(stranger_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(imitation, "GAMES_AT_ONCE", 2)
    run = (f"--preset paper --no-4bit --generated --model {stranger_folder} --lora-r 4 --max-response 4 --max-steps 15 --panel 1 "
           "--groups 1 --group-size 2 --warmup-max 1 --variant gigpo --mining-max 0 --distill-max 0 --imitate 4 --imitate-lr 0.01 --name x")
    assert main(run.split()) == 0
    out = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"games imitated  (\S+) nats", out)]
    assert len(losses) == 2 and losses[1] < 0.95 * losses[0]
    labels = [r["label"] for r in json.loads((tmp_path / "runs" / "x" / "results.json").read_text())]
    assert labels == ["before imitation", "base", "final"] and "4 games imitated" in out
    real = siri.evaluate

    def winning(*args, **more):
        played = real(*args, **more)
        played.episodes[0].success = True
        return played

    monkeypatch.setattr(siri, "evaluate", winning)
    assert main([*run.split()[:-1], "y"]) == 0
    assert "nothing is imitated" in (out := capsys.readouterr().out) and "games imitated" not in out


@slow
def test_a_cold_start_that_was_killed_is_made_again_to_the_same_policy(stranger_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = (f"--preset paper --no-4bit --generated --model {stranger_folder} --lora-r 4 --max-response 4 --max-steps 15 --panel 1 "
           "--groups 1 --group-size 2 --warmup-max 1 --variant gigpo --mining-max 0 --distill-max 0 --imitate 2 --name").split()
    real, adapter = siri.update, lambda name: (latest_checkpoint(tmp_path / "runs" / name) / "adapter_model.safetensors").read_bytes()

    def killed(*args):
        real(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siri, "update", killed)
        assert main([*run, "x"]) == 130
    assert main(["--resume", "runs/x"]) == 0 and main([*run, "y"]) == 0
    assert adapter("x") == adapter("y")
    labels = [[r["label"] for r in read_json(tmp_path / "runs" / name / "results.json")] for name in "xy"]
    assert labels == [["before imitation", "base", "final"]] * 2


def test_the_tiny_policy_imitates_nothing(capsys):
    assert main(["--preset", "tiny", "--imitate", "3"]) == 2
    assert capsys.readouterr().err.startswith("siri: --imitate 3: the tiny policy has been taught already; leave it out")


# ---- worlds of one's own ---------------------------------------------------------------------------------------------

EXAMPLES, SHORT = HERE / "docs/examples", ("--preset smoke --warmup-max 1 --mining-max 1 --distill-max 1 --panel 2 --groups 2 "
                                           "--group-size 2 --lora-r 4").split()
ROOM = (EXAMPLES / "room.py").read_text()


@pytest.fixture
def abroad(tmp_path, monkeypatch):
    """The working folder is outside the repository, with blanks and umlauts in its path; the examples are in it."""
    folder = tmp_path / "eigene Räume"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("games"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


def lesson():
    """The world that notebook 6 writes on the spot, as a file."""
    cells = json.loads((HERE / "notebooks/6_paper_setting_and_your_own_environment.ipynb").read_text())["cells"]
    game, room = ("".join(cell["source"]) for cell in cells if re.search("^class (Search|Room)", "".join(cell["source"]), re.M))
    return f"import envs\n{game}\n{room}"


def phases_of(run):
    with (run / "metrics.csv").open() as f:
        return [int(row.split(",")[1]) for row in f.read().splitlines()[1:]]


@pytest.mark.parametrize("env, name, panel", [
    ("room.py:Room", "room-Room", "room test"), pytest.param("sub ordner/lesson.py:Room", "lesson-Room", "room test", marks=slow),
    ("gym_room.py:GymRoom", "gym_room-GymRoom", "gymroom test")])
def test_a_world_of_ones_own_goes_through_all_phases(abroad, capsys, env, name, panel):
    (abroad / "sub ordner").mkdir()
    (abroad / "sub ordner/lesson.py").write_text(lesson())
    assert main([*SHORT, "--env", env]) == 0
    run = abroad / f"runs/{name}-smoke-siri-seed0"
    saved = read_json(run / "config.json")
    assert phases_of(run) == [0, 1, 2] and saved["env"] == env and saved["max_steps"] == 2 and saved["split"] == "test"
    assert re.fullmatch("[0-9a-f]{16}", saved["env_hash"])
    if env == "room.py:Room":
        assert main(["--resume", str(run), "--distill-max", "2"]) == 0 and phases_of(run) == [0, 1, 2, 2]
        assert main(["--report", str(run)]) == 0
    assert main(["--eval", str(run), "--panel", "3"]) == 0
    results = read_json(run / "results.json")
    assert results[-1]["label"] == "eval" and results[-1]["panel"] == f"{panel}, 3 games"
    assert {r["settings"]["env_hash"] for r in results} == {saved["env_hash"]}
    if env == "room.py:Room":                           # the card has the class's own prompts, in a process that has not trained, too
        text = (abroad / "room.py").read_text()
        (abroad / "room.py").write_text(text.replace("    max_steps = 2\n", "    max_steps = 2\n    prompts = dict(compact='{observation} {skill} aim : {goal}')\n"))
    capsys.readouterr()
    assert main(["--export", str(run), "--to", "home"]) == 0
    assert ("has changed since this run began" in capsys.readouterr().out) == (env == "room.py:Room")
    assert ("{observation} {skill} aim : {goal}" if env == "room.py:Room" else "{skill}task : {goal}") in Path("home/README.md").read_text()
    (abroad / env.partition(":")[0]).unlink()
    assert main(["--export", str(run), "--to", "away"]) == 2 and "there is no file" in capsys.readouterr().err and not Path("away").exists()


def looked_at(text, env="room.py:Room", **given):
    """The world that this text makes, after all checks."""
    (file := worlds.Path("room.py")).write_text(text)
    world = make_environment(resolve(dict(preset="smoke", env=env, **given))[0])
    assert file.exists()
    return world


@pytest.mark.parametrize("old, new, says", [
    ("def tasks", "def task", r"Room has no method tasks\(split\); did you mean task"),
    ("def open", "def start", r"Room has no method open\(task\)$"),
    ("    max_steps = 2\n", "", "Room has no max_steps; add it: max_steps = ..."),
    ("max_steps = 2", "max_step = 2", "did you mean max_step"), ("max_steps = 2", "max_steps = '2'", "max_steps is '2', expected a whole"),
    ("max_steps = 2", "max_steps, splits = 2, ('a', 'b')", "splits is .*expected names of splits, 'train' among them"),
    ("max_steps = 2", "max_steps, name = 2, 3", "name is '3', expected a text"),
    ("max_steps = 2", "max_steps, name = 2, 'webshop'", "has the name of a benchmark"),
    ("max_steps = 2", "max_steps, scored = 2, 'no'", "scored is 'no', expected true or false"),
    ("max_steps = 2", "max_steps, success_reward = 2, 0", "success_reward is '0', expected a finite number > 0"),
    ("class Room", "class Raum", r"room.py has no class Room; its classes: Search, Raum$"), ("class Room", "class Rooms", "did you mean Rooms"),
    ("def step", "def stop", r"open\(task\) gives, a Search, has no step\(state, action\); did you mean stop"),
    ("self.start =", "self.begin =", "a Search, has no start"), ("return Search(task)", "return None", "a NoneType, has no start"),
    ("import random", "import random random", "SyntaxError.*line 3"), ("import random", "import ran", r"No module named 'ran' \(line 3 of room.py"),
    ("import random", "raise SystemExit(3)", r"cannot be imported: SystemExit: 3 \(line 3"),
    ("self, seed", "self, size, seed", r"needs size to be made; give it a default \(known are seed, max_steps"),
    ("self.usual =", "1 / 0\n        self.usual =", r"cannot be made: ZeroDivisionError: .*\(line 29 of room.py\)"),
    ("range(300)", "range(0)", r"tasks\('train'\) is empty"), ("{split}/{i}", "{i}", "has task .* in train and in test; ids are unique"),
    ("{split}/{i}", "{split}", r"\[1\] is another one of id 'train'"), ("split, data", "'train', data", r"tasks\('test'\)\[0\] is of split 'train'"),
    ("out.append(Task(", "out.append((", "SyntaxError"), ("return out", "return [1]", "is a int, not an envs.Task"),
    ("random.Random(split)", "dict(train=random)[split]", r"tasks\('test'\) fails: KeyError: 'test' \(line .*are its splits \('train', 'test'\)"),
    ("return State(", "return str(", "in a first game .train/0.: TypeError"), ("return self.state(f", "return str or self.state(f", "is a type, not an envs.State"),
    ("return State(text,", "return State(5,", "observation is a int, not a text"), ("tuple(f", "str(f", "admissible is not a tuple of texts"),
    ("go to {place} 1\" for", "Go to {place} 1\" for", "has the action 'Go to bed 1', and answers lose capitals"),
    ("in PLACES)", "in ())", "admissible is empty"),
    ("return self.state(f\"you", "self.n = getattr(self, 'n', 0) + 1\n        return self.state(f\"{self.n} you", "step is not a function of its state"),
    ("a room .", "a castle .", "--model assets/tiny: the small policy cannot read these words of .*: 'castle'; .*--preset paper --no-4bit --model FOLDER"),
    ("max_steps = 2", "max_steps, prompts = 2, dict(full='{goal} {skil}')", "prompts.'full'. cannot be filled in .KeyError: 'skil'"),
    ("max_steps = 2", "max_steps, prompts = 2, dict(full='{goal} {observation}')", "prompts.'full'. has no {skill}")])
def test_what_is_wrong_with_an_own_class_is_said_in_one_line(abroad, old, new, says):
    assert ROOM.count(old)
    with pytest.raises(UserError, match=says) as error:
        looked_at(ROOM.replace(old, new))
    assert "\n" not in str(error.value) and "--" in str(error.value)
    assert looked_at(ROOM).name == "room"                                   # mended, and found again


def test_flags_of_an_own_world(abroad):
    for given, says in ((dict(env="room.py:Rom"), "did you mean Room"), (dict(env="nowhere.py:Room"), "there is no file .*Räume/nowhere.py"),
                        (dict(env="room.py"), "FILE.py:Class"), (dict(env="no.such:Room"), "no.such cannot be imported"),
                        (dict(env="room.py:Room", split="valid_seen"), "--split valid_seen: must be one of train, test"),
                        (dict(env="room.py:Room", generated=True), "has no effect without --env alfworld or webshop")):
        with pytest.raises(UserError, match=says):
            resolve(dict(preset="smoke", **given))
    cfg = resolve(dict(preset="smoke", env="room.py:Room"))[0]
    (run := abroad / "runs/x").mkdir(parents=True)
    write_json(run / "config.json", dataclasses.asdict(cfg))
    assert settings.load_config(run, {}) == cfg
    for inside in ("runs/x/samples/evil.py:Room", f"{abroad}/runs/../runs/x/evil.py:Room", "runs.x.evil:Room"):      # run folders hold no code
        write_json(run / "config.json", dataclasses.asdict(cfg) | dict(env=inside))
        with pytest.raises(UserError, match="code within the run folder"):
            settings.load_config(run, {})
    write_json(run / "config.json", dataclasses.asdict(cfg))
    os.chdir("/")
    with pytest.raises(UserError, match=r"no file /room.py; a relative path .*\(with the settings in .*config.json\)"):
        settings.load_config(run, {})
    assert settings.load_config(run, dict(env=f"{abroad}/room.py:Room")).env_hash == cfg.env_hash
    package = resolve(dict(preset="smoke", env="docs.examples.room:Room"))[0]                   # the repository is on the path here
    assert settings.run_name(package) == "docs.examples.room-Room-smoke-siri-seed0"


def test_a_change_of_the_file_is_said_when_a_run_goes_on(abroad, capsys):
    cfg = resolve(dict(preset="smoke", env="room.py:Room"))[0]
    (run := abroad / "runs/x").mkdir(parents=True)
    write_json(run / "config.json", dataclasses.asdict(cfg))
    (abroad / "room.py").write_text(ROOM.replace("0.9", "0.8"))
    assert settings.load_config(run, {}).env_hash != cfg.env_hash
    assert "warning: the file of room.py:Room has changed" in capsys.readouterr().out


def test_actions_prompts_and_length_are_as_the_world_has_them(abroad):
    text = ROOM.replace("go to", "Go  to").replace("max_steps = 2", "max_steps, verbatim = 3, True\n    splits = ('dev', 'train', 'held out')\n"
                                                   "    prompts = dict(full='{goal}|{skill}|{observation}|{actions}')")
    room = looked_at(text, compact=False, prompt_style="full")
    assert room.max_steps == 3 and room.own.splits[-1] == "held out" and envs.parse_action("<think></think><action> Go  to Bed </action>", True) == "Go  to Bed"
    with room.open(room.tasks("held out")[0]) as game:
        assert game.task.split == "held out"
        prompt = envs.render_prompt("find a pen", game.start, [], world="room.py:Room")
        assert prompt.startswith("find a pen||you are in the middle of a room .|'Go  to bed 1', ")
        state = game.start
        for _ in range(3):
            state = game.step(state, "Go  to hell")
        assert state.done and state.steps == 3 and not state.valid and not state.success
    looked_at(ROOM)
    plain = envs.render_prompt("find a pen", dataclasses.replace(game.start, admissible=("help", "look")), [], world="room.py:Room")
    assert "household" not in plain and "shop" not in plain and "['help', 'look']" in plain
    shown = envs.render_prompt("find a pen", dataclasses.replace(game.start, admissible=("help", "examine me")), [], style="compact", world="x.py:X")
    assert "can : help ; examine me" in shown


def test_a_world_that_fails_later_loses_a_group_and_says_where(abroad):
    room = looked_at(ROOM.replace("return self.state(f", "return 1 / (action != 'go to bed 1' or state.steps) and self.state(f").replace(
        "found = action", "if action == 'dig':\n            return None\n        found = action").replace('"bed desk', '"desk bed'))
    with envs.Games(room, room.tasks("train")[:2]) as games:
        for g, action in enumerate(("go to bed 1", "dig")):
            assert games.step(g, games.start(g), action) is None
    assert games.lost[0] == "train/0: WorldError: ZeroDivisionError: division by zero (line 23 of room.py)"
    assert games.lost[1] == "train/1: WorldError: step(state, action) is a NoneType, not an envs.State"


class Count:
    """Three rights make a win: a Gymnasium-style environment with a memory, and with chance that its seed decides or not."""

    def __init__(self, chance=False):
        self.chance, self.played = chance, 0

    def reset(self, *, seed):
        self.at, self.noise = 0, self.played if self.chance else seed
        return f"at 0 of {self.noise}", {"admissible_commands": ["left", "right"]}

    def step(self, action):
        self.played += 1
        self.at += action == "right"
        return f"at {self.at} of {self.noise}", float(self.at == 3), self.at == 3, action == "cut", {"admissible_commands": ["left", "right"]}


class Counting(gym_text.GymWorld):
    max_steps, goal, made = 5, "get to three", None

    def make(self, task):
        self.made = Count()
        return self.made


@pytest.mark.parametrize("copies", [False, True])
def test_a_gym_environment_branches_like_a_function(copies):
    """Interleaved rollouts see what each would see alone; `truncated` ends an episode and wins none."""
    world = Counting()
    world.copies = copies
    game = world.open(world.tasks("test")[0])
    assert game.start.observation == "at 0 of 200"                          # train has the seeds below
    one = game.step(game.start, "right")
    two = game.step(one, "right")
    other = game.step(game.start, "left")
    assert game.step(other, "right").observation == "at 1 of 200" and game.step(one, "right") is two
    won, cut = game.step(two, "right"), game.step(two, "cut")
    assert (won.done, won.success, won.reward, won.score) == (True, True, 1.0, 1.0)
    assert (cut.done, cut.success, cut.reward, cut.valid) == (True, False, 0.0, False)
    assert world.succeeded(0.0, {"success": True}) and not world.succeeded(1.0, {"success": False}) and world.succeeded(1.0, {})


def test_a_gym_world_that_makes_no_environment_is_refused_with_what_to_write(abroad):
    with pytest.raises(UserError, match=r"in a first game .train/0.: NotImplementedError: write make\(self, task\), which gives"):
        looked_at("from tools.gym_text import GymWorld\n\nclass Room(GymWorld):\n    max_steps, goal, commands = 4, 'win', ('a', 'b')\n")


def test_a_gym_environment_that_its_seed_does_not_decide_is_found_out():
    world = Counting()
    world.make = lambda task: Count(chance=True)
    game = world.open(world.tasks("train")[0])
    state = game.step(game.start, "right")
    game.step(state, "right")
    with pytest.raises(ValueError, match="the seed doesn't decide everything; try copies = True"):
        game.step(state, "left")
    world.copies = True
    game = world.open(world.tasks("train")[0])
    state = game.step(game.start, "right")
    assert game.step(game.step(state, "right"), "left").observation == game.step(game.step(state, "left"), "right").observation


@slow
def test_a_textworld_game_goes_through_all_phases(abroad, tmp_path, monkeypatch):
    """Games of `tw-make`, with a random chat model; the small policy can't read them, and says so."""
    for name, seed in (("train-1", 1), ("train-2", 2), ("test-1", 3)):
        subprocess.run([f"{os.path.dirname(sys.executable)}/tw-make", "custom", "--world-size", "1", "--nb-objects", "3", "--quest-length", "1",
                        "--seed", str(seed), "--output", f"games/{name}.z8", "--silent"], check=True)
    with pytest.raises(UserError, match="small policy cannot read these words"):
        make_environment(resolve(dict(preset="smoke", env="tw_game.py:TwGames"))[0])
    write_model(tmp_path / "model")
    chat = f"--env tw_game.py:TwGames --model {tmp_path}/model --no-compact --prompt-style full --max-prompt 2048 --max-steps 3".split()
    assert main([*SHORT, *chat, "--panel", "1"]) == 0
    run = abroad / "runs/tw_game-TwGames-smoke-siri-seed0"
    assert phases_of(run) == [0, 1, 2] and main(["--resume", str(run), "--distill-max", "2"]) == 0 and main(["--eval", str(run)]) == 0
    world = make_environment(resolve(dict(preset="paper", four_bit=False, model=str(tmp_path / "model"), env="tw_game.py:TwGames"))[0])
    with world.open(world.tasks("train")[0]) as game:                       # its quest: one action
        after = [game.step(game.start, action) for action in game.start.admissible]
    assert sum(state.success and state.reward == 1 and state.done for state in after) == 1


# ---- 10. a run that is watched -----------------------------------------------------------------------------------------

@pytest.fixture
def screen(monkeypatch):
    """A terminal of so many columns as standard output and error; returns what is then on it, row by row."""
    here, there = os.openpty()
    os.set_blocking(here, False)
    stream, said = open(there, "w", buffering=1), []

    def open_screen(columns):
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr("sys.stderr", stream)

        def read():
            rows, row, column = [""], 0, 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    said.append(os.read(here, 10**5))
            for code, char in re.findall(r"(\x1b\[\d*[A-Z])|(.)", b"".join(said).decode(), re.S):
                row, column = row - (code == "\x1b[A") + (char == "\n"), 0 if char == "\r" else column
                rows += [""] * (row + 1 - len(rows))
                if char and char not in "\r\n":
                    rows[row] = rows[row][:column].ljust(column) + char + rows[row][column + 1:]
                    column += 1
            return [text.rstrip() for text in rows]

        return read

    yield open_screen
    stream.close()
    os.close(here)


def full_row(phase, **values):
    """A row with all that a line shows, numbers long."""
    return metrics_row(1234, phase, **{**dict(success_plain=0.25, n_plain=128, solved_tasks=3021, skills_candidate=12, skills_active=30,
                                              skills_retired=9, rollout_s=123.0, update_s=234.0), **values})


@pytest.mark.parametrize("columns", [None, 80, 40])
@pytest.mark.parametrize("phase", [0, 1, 2])
def test_a_line_fits_and_keeps_what_matters_most(screen, phase, columns):
    if columns:
        screen(columns)
    scores = dict(score_plain=0.31, score_plain_se=0.04, score_skill=0.5, score_skill_se=0.05)
    for more in ({}, scores, dict(scores, n_plain=1, score_plain_se=math.nan), dict(n_plain=0, success_plain=math.nan, n_skill=0),
                 dict(invalid_rate=math.nan, score_plain=math.nan, score_plain_se=math.nan)):
        line = metrics.dense_line(full_row(phase, **more), "18h20")
        assert len(line) <= (columns or 101) - 1 and "nan" not in line and f"1234 {siri.PHASES[phase]}  plain " in line
        assert "eta 18h20" in line or columns == 40
    line = metrics.dense_line(full_row(phase), "18h20")
    if columns is None:
        for word in (["solved 3021", "kl 0.010", "123+234s"], ["skill 0.75±0.08 n 32", "skills 12c 30a 9r"],
                     ["skill 0.75±0.08 n 32", "lam 0.00"])[phase]:
            assert word in line
    assert "plain 0.25±0.04 n 128" in line
    result = evaluation("phase 1 with skills", 4, 102, 120, score=0.9, score_se=math.nan)
    for text in metrics.results_block("runs/x", [result, dict(result, label="curve"), result]).splitlines():
        assert len(text) <= (columns or 101) - 1 or columns == 40
        assert "nan" not in text and "curve" not in text


def fake_learner(**changes):
    """Of a run in its 10th of 30 iterations, without a policy."""
    cfg = dataclasses.replace(siri.Config(panel=4, warmup_max=15, mining_max=10, distill_max=5), **changes)
    return learner_of(SimpleNamespace(cfg=cfg, tick=None), env=SimpleNamespace(tasks=lambda split: "games of it"),
                      progress=siri.Progress(iteration=10, env_steps=1000))


def test_the_time_that_is_left_is_that_of_iterations_and_evaluations():
    """20 iterations of 60 s; four evaluations (one after mining is with skills) of 4 games of 30 s."""
    shown = progress.Progress(fake_learner())
    assert shown.eta() == ""
    shown.iterated(metrics_row(9, 0, rollout_s=20.0, update_s=40.0))
    assert shown.eta() == "20m"
    shown.evaluated(siri.Evaluation("base", [None] * 4, [], 120.0, False))
    assert progress.games_left(shown.learner) == 16 and shown.eta() == "28m"
    assert progress.games_left(fake_learner(eval_every=5, eval_panel=3)) == 16 + 4 * 3
    assert progress.games_left(fake_learner(variant="gigpo")) == 4 and progress.iterations_left(fake_learner(variant="gigpo")) == 20
    assert progress.iterations_left(fake_learner(env_steps=1250)) == 3                   # of 100 steps each, as so far
    shown.close()


def test_long_work_says_in_a_log_how_far_it_is(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    work = progress.Work(lambda: "; run: eta 3h12")
    for done, seconds in ((0, 0), (0, 60), (0, 60), (20, 60), (40, 60), (60, 100)):
        now[0] += seconds
        work("base", done, 140)
    work("rollout", 1, 32)                                      # another work: its time begins anew
    now[0] += 119
    work("rollout", 32, 32)
    work.close()
    out = capsys.readouterr()
    assert out.err == "" and out.out.splitlines() == [
        "     base 0/140; run: eta 3h12", "     base 40/140, 10m to go; run: eta 3h12"]


def test_bars_and_lines_share_a_terminal(screen):
    read = screen(80)
    shown = progress.Progress(fake_learner())
    for done in range(5):
        shown.work("rollout", done, 4)
    shown.iterated(metrics_row(9, 0, rollout_s=20.0, update_s=40.0))
    lines.say("a line")
    shown.bar.refresh()
    rows = read()
    assert rows[0] == "a line" and re.fullmatch(r"warm-up: +33%\|.*\| 10/30, plain 0.25, 1200 tok/s, eta 20m", rows[1])
    assert re.match(r"rollout: 100%\|.*\| 4/4 ", rows[2]) and all(len(row) <= 80 for row in rows) and "nan" not in "".join(rows)
    shown.close()
    lines.say("the end")
    assert [row for row in read() if row] == ["a line", "the end"]


def test_a_curve_is_measured_without_moving_the_run_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = ("--preset smoke --variant gigpo --warmup-max 2 --mining-max 0 --distill-max 0 --groups 1 --group-size 2 --panel 2 --max-steps 3"
           " --no-base-eval --name").split()
    curve = "--eval-every 1 --eval-panel 1".split()
    real, labels = siri.evaluate, []

    def stopped(policy, env, panel, cfg, label, *bank):
        labels.append((label, len(panel)))
        if len(labels) == 2:
            raise KeyboardInterrupt
        return real(policy, env, panel, cfg, label, *bank)

    assert main([*run, "plain"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siri, "evaluate", stopped)
        assert main([*run, "broken", *curve]) == 130
        assert main(["--resume", "runs/broken"]) == 0
    assert labels == [("curve", 1)] * 3 + [("final", 2)]
    plain, broken = ([{**r, "seconds": 0} for r in read_json(tmp_path / "runs" / name / "results.json")] for name in ("plain", "broken"))
    assert [(r["label"], r["iteration"], r["n"]) for r in broken] == [("curve", 0, 1), ("curve", 1, 1), ("final", 2, 2)]
    assert broken[-1:] == plain
    adapters = {(latest_checkpoint(tmp_path / "runs" / name) / "adapter_model.safetensors").read_bytes() for name in ("plain", "broken")}
    assert len(adapters) == 1
    assert "curve" not in capsys.readouterr().out.split("results of")[-1]


def test_a_tracker_that_is_missing_is_named_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in track.TRACKERS:
        assert main(["--preset", "smoke", "--track", name]) == 2
        out = capsys.readouterr()
        assert out.out == "" and out.err == f"siri: --track {name}: is not installed; pip install {name}, or leave it out (--track none)\n"
    assert {*track.TRACKERS, "none"} == {*next(f for f in dataclasses.fields(siri.Config) if f.name == "track").metadata["form"].words
                                         .removeprefix("one of ").split(", ")}


@pytest.mark.parametrize("fails", ["begin", "log", "end"])
def test_a_tracker_that_fails_ends_with_one_warning(monkeypatch, tmp_path, capsys, fails):
    def lost(*_):
        print("noise of a tracker")
        raise ConnectionError("no\nnetwork")

    sent = []
    monkeypatch.setitem(track.TRACKERS, "wandb", lambda *_: lost() if fails == "begin" else (
        lost if fails == "log" else lambda *said: sent.append(said), lost))
    tracker = track.Tracker(siri.Config(track="wandb"), tmp_path, None)
    for step in range(2):
        tracker.log(step, dict(kl=0.5, success_skill=math.nan), new_bank(), "a sample")
    tracker.close()
    tracker.close()
    assert capsys.readouterr().out == ("     warning: --track wandb failed and ends here, the run goes on (ConnectionError: no network)\n")
    assert sent == [(step, {"train/kl": 0.5}, None, "a sample") for step in range(2)] * (fails == "end")


@pytest.mark.parametrize("name", [*track.TRACKERS])
def test_a_tracker_holds_what_a_run_logs_and_goes_on_after_a_resume(name, tmp_path, monkeypatch, capsys):
    """Read back by TensorBoard's own reader, from trackio's database, and wandb's files (which takes seconds)."""
    if name == "wandb" and not os.environ.get("SIRI_SLOW"):
        pytest.skip("slow: set SIRI_SLOW=1 to run it")
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    if name == "trackio":
        monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "store")
    bank = new_bank()
    bank.add("the task needs pen | cup", "look on the desk first", 2, "game 7")
    for begins in (None, 2):
        tracker = track.Tracker(siri.Config(track=name, name="x"), tmp_path, begins)
        for step in range(begins or 0, (begins or 0) + 3):          # the third was logged, but not saved
            tracker.log(step, dict(kl=0.5 * step, success_skill=math.nan), bank, "a <sample>")
        tracker.evaluated(step, evaluation("phase 1 plain", step, 3, 4))
        tracker.close()
    assert capsys.readouterr().out == ""
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        log = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [(e.step, e.value) for e in log.Scalars("train/kl")] == [(0, 0), (1, 0.5), (2, 1), (2, 1), (3, 1.5), (4, 2)]
        low, high = (log.Scalars(f"eval/phase_1_plain/{end}")[0].value for end in ("low", "high"))
        assert (low, high) == pytest.approx(wilson(3, 4)) and "train/success_skill" not in log.Tags()["scalars"]
        text = log.Tensors("skills/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "| when the task needs pen \\| cup -> look on the desk first | candidate |" in text
    if name == "trackio":
        store = sqlite3.connect(tmp_path / "store" / "siri.db")
        said = [(step, run, json.loads(values)) for step, run, values in store.execute("select step, run_id, metrics from metrics")]
        assert [(step, v["train/kl"]) for step, _, v in said if "train/kl" in v] == [(k, 0.5 * k) for k in (0, 1, 2, 2, 3, 4)]
        assert len({run for _, run, _ in said}) == 1 and said[0][2]["skills"]["_value"][0]["state"] == "candidate"
        assert "a &lt;sample&gt;" in said[0][2]["sample"]["_value"]
    if name == "wandb":
        logs = [*tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
        assert len({path.name for path in logs}) == 1 and all(path.read_bytes().count(b"train/kl") >= 3 for path in logs)
