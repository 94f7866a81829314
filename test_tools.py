"""Commands beside a run, the lessons, and what the documentation promises."""

import ast
import contextlib
import copy
import dataclasses
import doctest
import fcntl
import html
import importlib
import io
import json
import math
import os
import re
import shlex
import sqlite3
import struct
import subprocess
import termios
from functools import lru_cache
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import distill
import envs
import gigpo
import ranks
import siri
import skills
from conftest import CHATML, HERE, config, learner_of, new_bank, slow, stranger_config, write_model
from conftest import metrics as run_metrics
from policy import Policy, UserError
from run import ACTIONS, add_result, append_metrics, main, parse_arguments, save_sample
from tools import bench, figures, imitation, metrics, probe, progress, report, track
from tools import play as terminal
from tools import terminal as lines
from tools.files import latest_checkpoint, read_json, write_json
from tools.metrics import wilson
from tools.oracle import winning_actions
from tools.settings import flag, make_environment, resolve

# ---- 1. the benchmark ------------------------------------------------------------------------------------------------


def spoken(groups):
    return [[s.response for s in e.steps] for group in groups for e in group]


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


@pytest.mark.parametrize("part, rows, work", [("rollouts", 4, ("steps", "tokens")), ("logprobs", 3, ()), ("paper", 12, ())])
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
    assert re.findall(r'<span class="(pos|neg)" style="--a:([\d.]+)"><', samples) == [("pos", "1.00"), ("neg", "0.50")] * 2
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


def test_the_report_is_one_accessible_page(reported):
    page, outline = written(reported)
    assert outline.faults == []
    assert outline.all("html", lang="en") and outline.all("meta", name="viewport")
    assert not {tag for tag, _ in outline.elements} & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert {a["href"][0] for a in outline.all("a")} == {"#"} and "http:" not in page and "https:" not in page
    assert re.findall(r"url\(|@import|src=", page) == []
    ids = [a["id"] for _, a in outline.elements if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in outline.all("a")} <= set(ids)
    figures_ = outline.all("svg", role="img")
    assert len(figures_) == len(outline.all("figure")) > 8
    for svg in figures_:
        assert len(svg["aria-labelledby"].split()) == 2 and set(svg["aria-labelledby"].split()) <= set(ids)
    assert all(a.get("aria-hidden") == "true" for a in outline.all("svg") if "role" not in a)
    assert len(outline.all("table")) == len(outline.all("caption")) == len(outline.all("div", role="region", tabindex="0"))
    assert all(a.get("scope") in ("col", "row") for a in outline.all("th"))
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    assert page == written(reported)[0]                                    # the same files, the same bytes


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
def test_the_report_fits_a_phone_and_a_desk(reported, tmp_path):
    """In a browser: no page scrolls sideways with every part unfolded, light or dark, and print unfolds what screens fold."""
    browser = os.environ.get("SIRI_CHROMIUM")
    if not browser:
        pytest.skip("set SIRI_CHROMIUM to a Chromium or Chrome to run it")
    data = read_json(reported / "samples/0005.json")
    data["episodes"][0]["steps"][0]["observation"] = "x" * 3000             # nothing to break at
    write_json(reported / "samples/0005.json", data)
    page = written(reported)[0]
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(page)}"></iframe>' for w in (390, 1280))
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
    for width, content, folded, drawn in measured:
        assert content <= width and folded >= 4 and drawn >= charts
    assert [m[0] for m in measured] == [390, 1280]
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
    assert "search[red shoes]" in out
    assert out.count("=== t/1") == 4                                        # the fourth game meets the end of the input


def test_play_sends_no_codes_to_the_terminal(monkeypatch, capsys):
    out = played(monkeypatch, capsys, "search[\x1b[5m]\nq\n")
    assert "after search" in out and [c for c in out if not c.isprintable() and c != "\n"] == []


def test_play_shows_the_policys_prompt_and_thoughts(monkeypatch, capsys):
    """`?` is the very prompt of `fit_prompt`; `h` asks and plays nothing; `w` plays on with what the policy says."""
    answers = iter(["<think> why not </think> <action> wait </action>",
                    "<think> enough \x1b[0m</think> <action> leave </action>"] * 2)
    policy = tiny_policy()
    monkeypatch.setattr(policy, "generate", lambda prompts, temperature, max_new, dice: [[7]])
    monkeypatch.setattr(policy, "decode", lambda ids: next(answers))
    out = played(monkeypatch, capsys, "?\nh\nh\nw\nq\n")
    world = PlayedShop()
    task = world.tasks("valid_seen")[0]
    game = world.open(task)
    prompt = policy.tokenizer.decode(siri.fit_prompt(policy, siri.Episode(task, None, state=game.start), None))
    assert figures.printable(prompt) in out and "<|im_start|>" in prompt and "the room" in prompt
    assert out.count("the policy: <think> why not </think> <action> wait </action>") == 2
    assert "enough \ufffd[0m</think>" in out and "=== success, score 1.00, 2 steps" in out
    assert out.count("[0 of 5]") == 2 and out.count("[1 of 5]") == 1        # h moved nothing; w went two steps; then a new game
    waited = siri.Step([], [], "", "wait", game.start.observation, "", None)
    later = siri.Episode(task, None, [waited], game.step(game.start, "wait"))
    later = policy.tokenizer.decode(siri.fit_prompt(policy, later, None))
    assert figures.printable(later) in played(monkeypatch, capsys, "wait\n?\n")


@pytest.mark.parametrize("env", ["alfworld", "webshop"])
def test_play_plays_both_benchmarks_with_a_real_policy(monkeypatch, capsys, env):
    cfg = resolve({"preset": "tiny", "env": env})[0]
    policy = Policy(cfg)
    monkeypatch.setattr(terminal, "Policy", lambda cfg, checkpoint: policy)
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n?\nw\n"))
    terminal.command("", {"preset": "tiny", "env": env})
    out = capsys.readouterr().out
    assert re.search(r"=== (success|not solved).*, \d+ steps", out) and "GENERATED" in out
    assert len(re.findall("the policy: <think>", out)) == int(re.search(r", (\d+) steps", out)[1]) - 1 > 0


def test_play_on_a_machine_that_fails_ends_with_its_mend(monkeypatch):
    monkeypatch.setattr(envs.AlfWorld, "engines", [])
    monkeypatch.setattr(envs._textworld().fd, "load_lib", lambda: (_ for _ in ()).throw(OSError("failed to map segment")))
    with pytest.raises(UserError, match="failed to map segment.*TMPDIR"):
        terminal.command("", {"preset": "tiny"})


def test_play_with_a_run_needs_its_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        terminal.command(str(tmp_path), {})

# ---- 3. the lessons --------------------------------------------------------------------------------------------------


LESSONS = sorted(HERE.glob("notebooks/*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in cell.outputs)


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
    assert any("image/png" in o.get("data", {}) for o in outputs)
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

# ---- 4. What the documentation promises ------------------------------------------------------------------------------


README = (HERE / "README.md").read_text()
PAGES = [HERE / "README.md", *sorted(HERE.glob("docs/*.md"))]
COMMANDS = [line.strip() for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text().replace("\\\n", " "), re.S)
            for line in re.split(r"\n|&&", block) if line.strip() and not line.strip().startswith("#")]
MODULES = ("gigpo", "skills", "distill", "envs", "decode", "ranks", "policy", "siri", "run")


@pytest.mark.parametrize("module", [gigpo, distill, skills, envs, ranks, siri, metrics, figures, progress, lines], ids=lambda module: module.__name__)
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
    floors = [{"gigpo", "skills", "distill", "envs", "decode", "ranks"}, {"policy"}, {"siri"}, {"tools.metrics", "tools.files", "tools.check"},
              {"tools.settings"},
              {"tools.report", "tools.play", "tools.bench", "tools.probe", "tools.imitation", "tools.progress", "tools.track"}, {"run"}]
    below = {"tools.figures", "tools.oracle", "tools.terminal", "tools.limits"}                               # of which nothing of the house is used but envs
    for floor in floors:
        for name in floor:
            assert imports_of(HERE / f"{name.replace('.', '/')}.py") <= below, name
        below |= floor
    assert imports_of(HERE / "policy.py") == {"gigpo", "decode", "ranks", "tools.limits", "tools.terminal"}
    assert imports_of(HERE / "ranks.py") == {"tools.terminal"}
    method = ast.parse((HERE / "siri.py").read_text())
    method.body = [node for node in method.body if not (isinstance(node, ast.If) and "__name__" in ast.dump(node.test))]
    names = {node.id for node in ast.walk(method) if isinstance(node, ast.Name)}
    names |= {alias.name for node in ast.walk(method) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not names & {"open", "print", "Path", "pathlib", "os", "json", "tqdm", "shutil"}


@pytest.mark.parametrize("name", ["siri", "policy", "ranks", "run"])
def test_no_function_is_longer_than_a_screen(name):
    functions = [n for n in ast.walk(ast.parse((HERE / f"{name}.py").read_text())) if isinstance(n, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_the_pages_of_settings_and_columns_are_complete(runs):
    from tools import settings
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
            assert match[2] in ("py", "json") or hasattr(importlib.import_module(match[1]), match[2]), name
        if re.fullmatch(r"test_\w+", name):
            assert name in tests, name
        if re.fullmatch(r"[\w./-]+\.(py|txt|ipynb)", name):
            assert (HERE / name).exists(), name
        if match := re.fullmatch(r"--(no-)?([a-z0-9-]+)( .*)?", name):
            assert match[2] in options, name
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_line_counts_of_the_readme_are_about_right():
    counts = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in counts} == {f"{name}.py" for name in MODULES}
    for name, told in counts:
        assert int(told) == pytest.approx(len((HERE / name).read_text().splitlines()), rel=0.05), name


def test_the_equations_of_the_readme_name_function_and_test():
    tags = re.findall(r"^\| ([GS]\d+) \|.*`(?:gigpo|skills|distill|siri)\..*`test_", README, re.M)
    assert tags == [f"G{i}" for i in range(1, 9)] + [f"S{i}" for i in range(1, 11)]


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
