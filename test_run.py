"""One run: whole runs, resuming to the byte, bad input, and what no text and no file may do."""

import ast
import contextlib
import copy
import dataclasses
import errno
import gc
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distill
import envs
import siri
import skills
from conftest import (
    HERE,
    LAMP,
    SMALL,
    SMOKE,
    TIMES,
    TINY,
    article,
    call,
    generated_shop,
    goal_of,
    make_folder,
    metrics,
    new_bank,
    offline,
    play,
    shop_of,
    slow,
    some,
    spoil,
    start,
    stranger_config,
    visit,
    walk,
    write_shop,
)
from decode import Decoder
from policy import Policy, UserError
from run import Lock, append_metrics, load_checkpoint, main, parse_arguments, save_checkpoint
from skills import Skill, SkillBank, SkillRejected
from tools import probe
from tools.files import checkpoints, damage, file_hash, latest_checkpoint, load_bank, write_json, write_text
from tools.metrics import wilson
from tools.settings import flag, load_config, make_environment, resolve

# ---- 1. whole runs ---------------------------------------------------------------------------------------------------


def test_a_run_goes_through_all_phases_and_says_so(runs):
    out = (runs[0] / "out.txt").read_text()
    first, *_, second = out.partition("variant siri")[0].splitlines()
    assert "GENERATED" in first and "not ALFWorld benchmark scores" in first
    assert "preset smoke (chosen by --preset)" in second and TINY in second
    rows = metrics(runs[0])
    assert [row["phase"] for row in rows] == list("011222") and [row["iteration"] for row in rows] == list("012345")
    assert all(int(row["n_plain"]) + int(row["n_skill"]) == 12 for row in rows) and rows[0]["n_skill"] == "0"
    assert sum(int(row["n_skill"]) for row in rows) > 0                                 # some skill was mined and tried
    assert [int(row["env_steps"]) for row in rows] == sorted(int(row["env_steps"]) for row in rows)
    assert len(re.findall(r"plain \d\.\d\d±\d\.\d\d n \d+ .* eta \d", out)) == 6           # a dense line an iteration
    assert max(map(len, out.splitlines())) <= 100 and not re.search(r"\bnan\b", out)
    assert (runs[0] / "err.txt").read_text() == ""                                      # no bar where nobody looks at one
    for phase in siri.PHASES:
        assert f"{phase} ends after" in out


LABELS = ["base", "after warm-up", "phase 1 plain", "phase 1 with skills", "final"]


def test_a_run_ends_with_a_block_of_results(runs):
    results = json.loads((runs[0] / "runs/x/results.json").read_text())
    assert [r["label"] for r in results] == LABELS and [r["skills"] for r in results] == [False] * 3 + [True, False]
    assert len({r["panel"] for r in results}) == 1 and len({tuple(r["outcomes"]) for r in results}) == 1
    block = (runs[0] / "out.txt").read_text().partition("results of runs/x")[2]
    for r in results:
        assert r["n"] == 4 == sum(kind["n"] for kind in r["kinds"].values())
        assert r["successes"] == sum(r["outcomes"].values()) == 4 * r["success"]
        assert r["interval"] == list(wilson(r["successes"], 4))
        lo, hi = r["interval"]
        assert re.search(rf"{r['label']} +success {r['success']:.3f} \[{lo:.3f}, {hi:.3f}\]  n 4 ", block)


def test_a_run_folder_holds_what_the_readme_promises(runs):
    folder = runs[0] / "runs/x"
    saved = json.loads((folder / "config.json").read_text())
    assert len(saved["base"]) == 16
    assert saved == dataclasses.asdict(resolve(parse_arguments(SMOKE)[1])[0]) | dict(base=saved["base"])
    bank, rows = SkillBank.from_json(json.loads((folder / "skills.json").read_text())), metrics(runs[0])
    assert bank.counts() == {state: int(rows[-1][f"skills_{state}"]) for state in skills.STATES}
    assert sum(skill.n for skill in bank.skills) == sum(int(row["n_skill"]) for row in rows)    # groups of 1 + 1
    assert sum(int(row["mined"]) for row in rows) == len(bank.skills) > 0
    last = latest_checkpoint(folder)
    assert {p.name for p in last.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "progress.json",
                                                "optimizer.safetensors", "skills.json"}
    assert not list(last.glob("model*.safetensors")) and len(list(last.parent.iterdir())) == 2
    sample = (folder / "samples/0000.txt").read_text()
    assert "<think>" in sample and "reward" in sample and "advantage" in sample


def same_run(through, broken):
    """Equal to the byte: weights, optimizer, bank, progress, results and metrics, all but times."""
    last = latest_checkpoint(through).relative_to(through)
    for name in (last / "adapter_model.safetensors", last / "optimizer.safetensors", last / "skills.json", "skills.json"):
        assert (through / name).read_bytes() == (broken / name).read_bytes(), name
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in metrics(folder.parent.parent)]
            for folder in (through, broken)]
    assert len(rows[0]) > 0 and rows[0] == rows[1]
    progress, results = ([json.loads((folder / name).read_text()) for folder in (through, broken)]
                         for name in (last / "progress.json", "results.json"))
    for a, b in (progress, *zip(*results)):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert len(results[0]) == len(results[1])


def test_a_killed_run_resumes_to_the_same_bytes(runs):
    assert len(metrics(runs[0])) == 6                                           # 4 + 2 iterations
    same_run(*(cwd / "runs/x" for cwd in runs))


@slow
def test_a_run_that_ended_with_mining_goes_on_when_granted_more_under_any_variant(runs, tmp_path):
    """The first two phases don't depend on the variants of the third, so one run of them serves all."""
    cwd = tmp_path / "siri"
    cwd.mkdir()
    assert start(cwd, *SMOKE, "--distill-max", "0").wait() == 0, (cwd / "err.txt").read_text()
    assert len(metrics(cwd)) == 3 and len(json.loads((cwd / "runs/x/results.json").read_text())) == 5
    other = shutil.copytree(cwd, tmp_path / "no_gate")
    for process, at in [(start(at, "--resume", "runs/x", "--distill-max", "3", "--variant", at.name), at) for at in (cwd, other)]:
        assert process.wait() == 0, (at / "err.txt").read_text()
    adapter, optimizer, rows = (
        [f(at) for at in (runs[0], cwd, other)] for f in (
            lambda at: (latest_checkpoint(at / "runs/x") / "adapter_model.safetensors").read_bytes(),
            lambda at: (latest_checkpoint(at / "runs/x") / "optimizer.safetensors").read_bytes(),
            lambda at: [{k: v for k, v in row.items() if k not in TIMES} for row in metrics(at)]))
    assert adapter[0] == adapter[1] and optimizer[0] == optimizer[1] and rows[0] == rows[1]
    assert rows[2][:3] == rows[0][:3] and int(rows[2][3]["internal_rows"]) > int(rows[0][3]["internal_rows"])
    assert adapter[2] != adapter[0]


def test_evaluating_a_run_repeats_its_last_result(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs[0])
    monkeypatch.setattr("run.add_result", lambda folder, result: added.append(result))
    added = []
    assert main(["--eval", "runs/x"]) == 0 and main(["--eval", "runs/x", "--with-skills"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ALFWorld: small GENERATED games") and len(re.findall(r"success .* n \d", out)) > 4
    final = json.loads(Path("runs/x/results.json").read_text())[-1]
    plain, skilled = added
    assert plain["outcomes"] == final["outcomes"] and plain["mean_steps"] == final["mean_steps"]
    assert (plain["skills"], skilled["skills"]) == (False, True)
    assert skilled["panel"] == plain["panel"] == final["panel"]


def test_resuming_a_finished_run_shows_its_results_and_changes_nothing(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs[0])
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert main(["--resume", "runs/x"]) == 0 and "results of runs/x" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("variant, phases, labels", [
    ("gigpo", "000", ["base", "final"]), pytest.param("no_warmup", "112", ["base", *LABELS[2:]], marks=slow)])
def test_variants_leave_phases_out_and_have_the_same_budget(tmp_path, monkeypatch, variant, phases, labels):
    monkeypatch.chdir(tmp_path)
    assert main(f"{SMALL} --variant {variant} --warmup-max 1 --mining-max 1 --distill-max 1 --panel 2 --groups 1 "
                     "--active-req 9".split()) == 0
    assert [row["phase"] for row in metrics(tmp_path)] == list(phases)
    assert [r["label"] for r in json.loads(Path("runs/x/results.json").read_text())] == labels


def test_a_run_on_webshop_reports_scores_and_says_what_it_shops_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(f"{SMALL} --env webshop --warmup-max 1 --mining-max 2 --distill-max 1 --panel 2 --groups 5 "
                     "--group-size 2".split()) == 0
    out = capsys.readouterr().out
    assert "GENERATED catalogue 0" in out.splitlines()[0] and "not WebShop benchmark scores" in out.splitlines()[0]
    tagger = json.loads(Path("runs/x/config.json").read_text())["webshop_tagger"]
    said = " ".join(out.split("preset smoke")[0].split())
    assert tagger == envs.find_tagger() and ("a stop-list" if tagger == "stop-list" else tagger) in said
    results = json.loads(Path("runs/x/results.json").read_text())
    assert [r["label"] for r in results] == LABELS and all(r["panel"] == "webshop test, 2 games" for r in results)
    assert all(r["success"] <= r["score"] <= 1 for r in results)
    assert re.search(rf"final +success .* score {results[-1]['score']:.3f}±{results[-1]['score_se']:.3f}  n 2", out)
    assert max(s["mean_steps"] for s in results) <= 15
    rows = metrics(tmp_path)
    assert sum(int(row["n_skill"]) for row in rows) > 0 and int(rows[-1]["internal_rows"]) > 0    # skills are tried, and distilled
    for row in rows:
        assert float(row["success_plain"]) <= float(row["score_plain"]) <= 1
        assert f"plain {float(row['success_plain']):.2f}" in out and f"score {float(row['score_plain']):.2f}±" in out


def test_webshop_has_the_settings_of_the_release():
    """15 steps, prompts of 4,096 tokens, advantages not divided by a deviation; a flag still has the last word."""
    cfg, _ = resolve(dict(env="webshop", preset="paper", four_bit=False, generated=True))
    assert (cfg.max_steps, cfg.max_prompt, cfg.norm, cfg.split) == (15, 4096, "mean", "test")
    assert resolve(dict(env="webshop", preset="paper", four_bit=False, generated=True, norm="std"))[0].norm == "std"
    assert resolve(dict(env="webshop", preset="tiny"))[0].model != resolve(dict(preset="tiny"))[0].model


@pytest.mark.parametrize("gib, given, preset", [
    (0, {}, "tiny"), (7.6, dict(generated=True), "small"), (15.8, dict(alfworld_data="."), "small"), (23.6, dict(alfworld_data="."), "paper"),
    (31.7, dict(generated=True), "paper"), (39.4, dict(alfworld_data="."), "paper48"), (79.1, dict(generated=True), "paper48"),
    (23.6, {}, "tiny"), (79.1, dict(env="webshop"), "tiny"), (79.1, dict(env="webshop", webshop_data="."), "paper48")])
def test_the_preset_follows_from_the_device_and_the_data(monkeypatch, gib, given, preset):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setattr("tools.settings.device_gib", lambda: gib)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gib > 0)
    cfg, reason = resolve(given)
    assert cfg.preset == preset and (f"{gib:.0f} GiB" in reason or not gib)
    assert ("alfworld-download" in reason or "--webshop-data" in reason) == (preset == "tiny" and gib > 0)


@pytest.mark.parametrize("world, says", [("alfworld", "alfworld-download.*--generated"), ("webshop", "--webshop-data.*--generated")])
@pytest.mark.parametrize("preset", ["small", "paper", "paper48"])
def test_a_preset_for_real_data_is_not_trained_on_generated_games_unasked(monkeypatch, preset, world, says):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(UserError, match=says):
        resolve(dict(preset=preset, env=world, four_bit=False))
    assert resolve(dict(preset=preset, env=world, four_bit=False, generated=True))[0].preset == preset
    if world == "alfworld":
        monkeypatch.setenv("ALFWORLD_DATA", "somewhere")
        assert resolve(dict(preset=preset, four_bit=False))[0].preset == preset


def test_a_budget_of_environment_steps_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(f"{SMALL} --env-steps 1 --panel 2 --groups 1".split()) == 0
    assert len(metrics(tmp_path)) == 1 and "the budget of 1 environment steps is spent" in capsys.readouterr().out
    assert [r["label"] for r in json.loads(Path("runs/x/results.json").read_text())] == ["base", "final"]

# ---- 2. bad input ----------------------------------------------------------------------------------------------------


def refusal(capsys, *args):
    """Run the program; its whole standard error must be one line of complaint."""
    capsys.readouterr()
    assert main(list(args)) == 2
    err = capsys.readouterr().err
    assert err.startswith("siri: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


SKILLS = "when the task needs apple -> look in fridge first"


@pytest.mark.parametrize("content, args, says", [
    (f"{SKILLS}\n\nlook in fridge\n", (), "line 3 is not of the form when CONDITION -> STRATEGY .unparsable.: look in fridge"),
    ("when a <|im_end|> -> go\n", (), "line 1 is not .*control token"), ("\n \n", (), "holds 0 skills"),
    (f"{SKILLS}\nwhen b -> c", ("--bank-size", "1"), "holds 2 skills, expected 1 to --bank-size 1"),
    (b"\xff\xfe", (), "cannot be read as text"), (None, (), "No such file"),
    (SKILLS, ("--variant", "gigpo"), "variant gigpo has no skills; leave it out"),
    (SKILLS, ("--variant", "distill_plain"), "variant distill_plain has no skills")])
def test_a_bank_that_cannot_be_used_is_refused_before_any_work(tmp_path, monkeypatch, capsys, content, args, says):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("b.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.search(says, refusal(capsys, "--preset", "smoke", "--bank", "b.txt", *args))


def test_skills_from_a_file_are_candidates_once_and_mining_can_be_left_out(tmp_path, monkeypatch, capsys):
    """They begin in the bank of the first checkpoint; a resumed run has them from there, and does not need the file."""
    monkeypatch.chdir(tmp_path)
    assert "there would be no skills at all; add --bank FILE" in refusal(capsys, "--preset", "smoke", "--mine-every", "0")
    Path("b.txt").write_text(f"{SKILLS}\n{SKILLS.upper().replace('WHEN', 'when')}\n\nwhen the task needs mug -> look in shelf 2 first\n")
    small = ["--preset", "smoke", "--groups", "1", "--group-size", "2", "--panel", "1", "--warmup-max", "1", "--mining-max", "1",
             "--distill-max", "0", "--max-steps", "2"]
    assert main([*small, "--bank", "b.txt", "--mine-every", "0", "--name", "x"]) == 0
    bank = load_bank(Path("runs/x"))
    assert [(s.text, s.source, s.born) for s in bank.skills] == [
        (SKILLS, "b.txt", 0), ("when the task needs mug -> look in shelf first", "b.txt", 0)]
    assert bank.skills[0].state == "candidate" and not bank.rejected
    Path("b.txt").unlink()
    assert main(["--resume", "runs/x", "--distill-max", "1"]) == 0 and len(load_bank(Path("runs/x")).skills) == 2


no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("args, says", [
    ("--grup-size 4", "--grup-size: unknown flag; did you mean --group-size?"), ("--xyzzy", "--xyzzy: unknown flag"),
    ("--groups four", "--groups.*'four'"), ("--lr", "--lr"), ("--lr 1e-3x", "--lr.*'1e-3x'"), ("train", "train"),
    ("--preset nonsense", "--preset nonsense: .*paper.*tiny.*smoke"), ("--variant grpo", "--variant grpo: .*no_warmup"),
    ("--env webshop9", "--env webshop9: .*alfworld.*webshop"), ("--split test", "--split test: .*valid_unseen"),
    ("--env webshop --split valid_seen", "--split valid_seen: .*validation"), ("--webshop-goals all", "--webshop-goals all"),
    (SMALL + " --env webshop --webshop-data .", "--webshop-data.*--preset paper"),
    (SMALL + " --env webshop --observation text_rich", "--observation text_rich: .*--prompt-style full"),
    (SMALL + " --env webshop --webshop-tagger xx_model", "xx_model.*not an installed.*stop-list"),
    (SMALL + " --env webshop --webshop-tagger json", "json.*not an installed.*stop-list"),       # a module, but no model
    (SMALL + " --env webshop --webshop-goals human", "--webshop-goals human: .*without --webshop-data"),
    (SMALL + " --webshop-split release", "--webshop-split release: .*without --env webshop"),
    (SMALL + " --env webshop --alfworld-data .", "--alfworld-data .: .*without --env alfworld"),
    (SMALL + " --env webshop --no-compact --prompt-style full --webshop-data ~nosuchuser/x", "~nosuchuser/x/items.*read"),
    (SMALL + " --env webshop --no-compact --webshop-data nowhere", "nowhere/items_shuffle_1000.json: cannot be read"),
    (SMALL + " --group-size 3", "--group-size 3: .*use 4"), (SMALL + " --group-size 0", "--group-size 0"),
    (SMALL + " --group-size 1 --variant gigpo", "--group-size 1: .*>= 2"),
    (SMALL + " --lr nan", "--lr nan"), (SMALL + " --lr inf", "--lr inf"), (SMALL + " --lr -1", "--lr -1"),
    (SMALL + " --temperature 0", "--temperature 0"), (SMALL + " --max-steps 0", "--max-steps 0"),
    (SMALL + " --seed -1", "--seed -1"), (SMALL + " --penalty-inside", "--penalty-inside: .*--baseline steps"),
    (SMALL + " --dual-clip 0.5", "--dual-clip 0.5"), (SMALL + " --tau-down 1 --tau-up 0", "--tau-down 1.0"),
    (SMALL + " --gamma 1.5", "--gamma 1.5"), (SMALL + " --alfworld-data .", "--alfworld-data.*--preset paper"),
    (SMALL + " --model nowhere/nothing", "--model nowhere/nothing"), ("--with-skills", "--with-skills: .*--eval"),
    ("--eval a --resume b", "--resume and --eval"), ("--play --bench", "--play and --bench"), ("--report ''", "no such folder"), ("--report a --seed 5", "--seed: --report takes no settings"), ("--eval nowhere", "nowhere: holds no checkpoint"),
    ("--resume nowhere", "nowhere: holds no checkpoint"),
    pytest.param("--preset paper", "4-bit .*--no-4bit.*--preset tiny", marks=no_cuda),
    pytest.param(SMALL + " --4bit", "4-bit .*--no-4bit", marks=no_cuda)])
def test_bad_flags_get_one_line_that_names_the_culprit(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch)
    assert re.search(says, refusal(capsys, *args.split()))
    assert re.search(says, refusal(capsys, *args.split()))            # nothing was left that is in the way


def test_a_run_keeps_its_split(tmp_path):
    """Goals 500-1499 are held out by one split and trained on by the other."""
    saved = resolve(dict(env="webshop", preset="smoke", webshop_split="release"))[0]
    write_json(tmp_path / "config.json", dataclasses.asdict(saved))
    assert load_config(tmp_path, dict(webshop_split="release", split="validation")) == dataclasses.replace(
        saved, split="validation")
    for change in (dict(webshop_split="original"), dict(webshop_size="full"), dict(webshop_goals="human")):
        (name, value), = change.items()
        with pytest.raises(UserError, match=f"--{flag(name)} {value}: .*trained with.*leave it out"):
            load_config(tmp_path, change)


def test_what_a_run_was_saved_with_is_no_reason_to_refuse_it(tmp_path):
    """Settings without effect are refused where they are given."""
    saved = dataclasses.replace(resolve(dict(env="webshop", preset="smoke"))[0], webshop_size="full")
    write_json(tmp_path / "config.json", dataclasses.asdict(saved))
    assert load_config(tmp_path, {}) == saved


def test_a_refusal_on_the_command_line_has_no_traceback_and_exit_code_2(tmp_path):
    process = start(tmp_path, "--grup-size", "4")
    assert process.wait() == 2 and (tmp_path / "out.txt").read_text() == ""
    assert (tmp_path / "err.txt").read_text() == "siri: --grup-size: unknown flag; did you mean --group-size?\n"


def test_before_installation_the_program_says_what_is_missing(tmp_path):
    """Without any package (-S) and any compiler (an empty PATH)."""
    def bare(*args):
        return subprocess.run([sys.executable, "-S", str(HERE / "siri.py"), *args], cwd=tmp_path, env={"PATH": ""},
                              capture_output=True, text=True)
    check, train = bare("--check"), bare("--env", "alfworld")
    assert check.returncode == 2 and "C++ compiler" in check.stderr and "build-essential" in check.stderr
    assert all(line.startswith("siri: ") for line in check.stderr.splitlines())
    assert train.returncode != 0
    assert re.fullmatch("siri: .* is missing: run `pip install -r requirements.txt`\n", train.stderr)


def test_the_check_runs_where_a_package_is_broken(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: cannot open shared object file')")
    done = subprocess.run([sys.executable, str(HERE / "siri.py"), "--check"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("make, says", [
    (lambda root: None, "json_2.1.1 is not a folder"),
    (lambda root: (root / "json_2.1.1").mkdir(parents=True), "no ALFWorld games in .*train"),
    (lambda root: make_folder(root, lambda text: text[:9000]), r"train/\S*/game.tw-pddl is not an ALFWorld game")])
def test_bad_data_folders_are_named(tmp_path, monkeypatch, capsys, stranger_folder, make, says):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data")
    err = refusal(capsys, "--preset", "paper", "--no-4bit", "--model", str(stranger_folder), "--alfworld-data",
                  str(tmp_path / "data"), "--name", "x")
    assert re.search(says, err) and "alfworld-download" in err


@pytest.fixture()
def copied_run(runs, tmp_path, monkeypatch):
    shutil.copytree(runs[0] / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Path("runs/x")


def test_the_name_of_a_run_is_used_once(copied_run, capsys):
    err = refusal(capsys, *SMOKE)
    assert "runs/x already holds a run" in err and "--resume runs/x" in err and "--name" in err


@pytest.mark.parametrize("left", ["metrics.csv", "results.json", "samples"])
def test_what_is_left_of_a_run_without_checkpoints_is_not_added_to(copied_run, capsys, left):
    shutil.rmtree(copied_run / "checkpoints")
    for name in {"metrics.csv", "results.json", "samples"} - {left}:
        (shutil.rmtree if name == "samples" else os.remove)(copied_run / name)
    assert re.search(f"runs/x: holds {left} of a run whose checkpoints are gone; .*--name", refusal(capsys, *SMOKE))


@pytest.mark.parametrize("change", [{"ucb": 0.2}, {"lr": "fast"}, {"groups": 2**60}])
def test_settings_of_another_version_are_refused_with_the_way_on(copied_run, capsys, change):
    config = copied_run / "config.json"
    write_json(config, json.loads(config.read_text()) | change)
    name, value = next(iter(change.items()))
    err = refusal(capsys, "--resume", "runs/x")
    assert f"runs/x/config.json: settings{'' if name == 'ucb' else '.'}" in err and name in err and "begin a new one" in err
    assert ("9e15" in err) == (value == 2**60)


FILES = ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "progress.json", "skills.json",
         "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["cut", "missing", "other"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied_run, capsys, file, how):
    newest, older = checkpoints(copied_run)
    spoil(newest / file, how)
    assert latest_checkpoint(copied_run) == older
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"siri: {newest} cannot be used" in err and (file in err or how == "other")
    spoil(older / file, how)
    for action in ("--resume", "--eval"):
        assert main([action, str(copied_run)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"siri: {copied_run}: holds no sound checkpoint")


def test_every_cut_and_every_flipped_bit_of_a_checkpoint_is_noticed(copied_run):
    """Each length of a small file, 40 of a large one; 200 bits at random places."""
    rng, checkpoint = random.Random(0), latest_checkpoint(copied_run)
    whole = {file: (checkpoint / file).read_bytes() for file in FILES}
    assert damage(checkpoint) == ""
    for file, data in whole.items():
        for length in range(len(data)) if len(data) < 3000 else rng.sample(range(len(data)), 40):
            (checkpoint / file).write_bytes(data[:length])
            assert damage(checkpoint), (file, length)
        (checkpoint / file).write_bytes(data)
    for _ in range(200):
        file = rng.choice(FILES)
        data, at = bytearray(whole[file]), rng.randrange(len(whole[file]))
        data[at] ^= 1 << rng.randrange(8)
        (checkpoint / file).write_bytes(data)
        harmless = file == "manifest.json" and json.loads(whole[file]) == loads_or_none(data)      # white space
        assert bool(damage(checkpoint)) != harmless, (file, at)
        (checkpoint / file).write_bytes(whole[file])


def loads_or_none(data):
    try:
        return json.loads(bytes(data))
    except ValueError:
        return None


@slow
@pytest.mark.parametrize("env", ["alfworld", "webshop"])
def test_twenty_five_kills_at_random_moments_change_nothing(tmp_path, env):
    """kill -9 anywhere in a life of the process: start, rollout, update, evaluation, writing. Then it may finish."""
    rng, kills, started, command = random.Random(0), 0, time.monotonic(), [*SMOKE, "--env", env, "--max-steps", "10"]
    assert start(tmp_path, *command).wait() == 0, (tmp_path / "err.txt").read_text()
    took = time.monotonic() - started
    while kills < 25:
        cwd = Path(tempfile.mkdtemp(dir=tmp_path))
        while True:
            process = start(cwd, *(["--resume", "runs/x"] if checkpoints(cwd / "runs/x") else command))
            try:
                process.wait(rng.uniform(0, 0.6 * took))
                assert process.returncode == 0, (cwd / "err.txt").read_text()
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        same_run(tmp_path / "runs/x", cwd / "runs/x")


@slow
def test_three_hundred_iterations_with_faults_end_whole_and_in_flat_memory(tmp_path, monkeypatch, capsys):
    """Games that raise, gradients that are not finite, a full device, signals, torn files, a full disk, a machine without room for
    games, a clock that jumps: all are survived, and no row is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run.SIGNALS", (signal.SIGUSR1, signal.SIGTERM))
    rng, seen, memory = random.Random(0), Counter(), {}
    open_game, clip, learn = envs.AlfWorld.open, torch.nn.utils.clip_grad_norm_, siri.learn
    step, replace, clock = Decoder.step, os.replace, time.time

    def faulty_open(env, task):
        if rng.random() < 0.01:
            seen["game"] += 1
            raise RuntimeError("the game is broken")
        if rng.random() < 0.01:
            seen["machine"] += 1
            raise envs.MachineFault("no room in TMPDIR")
        return open_game(env, task)

    def full_replace(*paths):
        if rng.random() < 0.01:
            seen["disk"] += 1
            raise OSError(errno.ENOSPC, "No space left on device", str(paths[1]))
        return replace(*paths)

    def jumping_clock():
        seen["clock"] += 1
        return clock() + rng.choice([-10**6, 0, 10**6])

    def faulty_clip(*args):
        norm, bad = clip(*args), rng.random() < 0.05
        seen["gradient"] += bad
        return norm * math.nan if bad else norm

    def faulty_step(decoder, *args):
        if rng.random() < 0.001:
            seen["memory"] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(decoder, *args)

    def faulty_learn(learner, *args):
        row = learn(learner, *args)
        memory[learner.progress.iteration] = int(Path("/proc/self/statm").read_text().split()[1])
        if rng.random() < 0.05:
            seen["signal"] += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    monkeypatch.setattr(os, "replace", full_replace)
    monkeypatch.setattr(time, "time", jumping_clock)
    monkeypatch.setattr(envs.AlfWorld, "open", faulty_open)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", faulty_clip)
    monkeypatch.setattr(Decoder, "step", faulty_step)
    monkeypatch.setattr(siri, "learn", faulty_learn)
    code = main(f"{SMALL} --variant gigpo --groups 2 --group-size 2 --max-steps 4 --panel 2 --warmup-max 296".split())
    while code in (2, 130):
        last = capsys.readouterr().err.splitlines()[-1]
        assert "--resume runs/x" in last and (code == 130 or re.search("No space left|no room in TMPDIR", last)), last
        newest = checkpoints(Path("runs/x"))[0]
        if rng.random() < 0.3:
            seen["torn file"] += 1
            spoil(newest / rng.choice(FILES), rng.choice(["cut", "missing", "other"]))
        gc.collect()                            # the run that ended goes with its process, in life
        code = main(["--resume", "runs/x"])
    assert code == 0, capsys.readouterr().err
    assert [int(row["iteration"]) for row in metrics(tmp_path)] == list(range(300))
    assert all(seen[fault] >= 3 for fault in ("game", "machine", "gradient", "memory", "signal", "torn file", "disk", "clock")), seen
    floor = lambda last: min(memory[k] for k in range(last - 9, last + 1))      # a leak raises the floor, one update does not
    assert floor(300) < 1.05 * floor(20), (floor(20), floor(300))


@pytest.mark.parametrize("file", ["config.json"])
@pytest.mark.parametrize("how", ["cut", "missing", "other"])
def test_a_damaged_config_is_named(copied_run, capsys, file, how):
    spoil(copied_run / file, how)
    for action in ("--resume", "--eval"):
        assert main([action, str(copied_run)]) == 2
        assert str(copied_run) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("line", ["", "1", "6,2,0.5", "6" + ",1" * 40 + "\n"])
def test_torn_and_later_rows_of_the_metrics_are_cut_off_on_resuming(copied_run, line, monkeypatch):
    """The last checkpoint is from after iteration 5. What a killed write left behind it goes, and no row is lost."""
    metrics_file = copied_run / "metrics.csv"
    before = metrics_file.read_bytes()
    metrics_file.write_bytes(before + line.encode())
    assert main(["--resume", str(copied_run)]) == 0
    assert metrics_file.read_bytes() == before


def test_what_the_adapter_is_made_with_cannot_be_changed_later(copied_run, capsys):
    for name in ("--lora-r", "--lora-alpha"):
        assert f"{name} 4" in refusal(capsys, "--resume", str(copied_run), name, "4")


def test_the_moments_of_another_optimizer_begin_anew(copied_run, capsys):
    """bitsandbytes keeps other tensors than torch, and --4bit chooses between them."""
    checkpoint = latest_checkpoint(copied_run)
    cfg = load_config(copied_run, {})
    learner = siri.Learner.begin(cfg, make_environment(cfg), Policy(cfg, checkpoint))
    load_checkpoint(learner, checkpoint)
    assert learner.optimizer.state and "begin anew" not in capsys.readouterr().out
    learner.cfg = dataclasses.replace(cfg, four_bit=True)
    load_checkpoint(learner, checkpoint)
    assert not learner.optimizer.state and "begin anew" in capsys.readouterr().out


def test_one_process_at_a_time_uses_a_run_folder(copied_run, capsys):
    held = Lock(copied_run)
    for action in ("--resume", "--eval"):
        assert "runs/x is in use by another process" in refusal(capsys, action, str(copied_run))
    held.close()
    assert main(["--resume", str(copied_run)]) == 0


def test_a_run_s_name_stays_in_the_folder_of_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("../x", "/x", "a/b", ".", "..", "-x"):
        assert f"--name {name}" in refusal(capsys, "--preset", "smoke", f"--name={name}")
    assert list(tmp_path.iterdir()) == []


def wait_for(condition, process):
    while not condition() and process.poll() is None:
        time.sleep(0.02)


def test_a_signal_lets_the_iteration_end(tmp_path):
    args = f"{SMALL} --groups 2 --group-size 2 --warmup-max 50 --n-req 999 --panel 1".split()
    process = start(tmp_path, *args)
    wait_for(lambda: (tmp_path / "out.txt").read_text().count(" warm-up  plain ") >= 2, process)     # a line comes at once
    assert len(metrics(tmp_path)) < 9
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: "siri: stopped" in (tmp_path / "err.txt").read_text(), process)
    process.send_signal(signal.SIGTERM)                     # while the interpreter ends: nothing is left to stop
    assert process.wait() == 130
    done = len(metrics(tmp_path))
    last = (tmp_path / "err.txt").read_text().splitlines()[-1]
    assert last == f"siri: stopped before iteration {done}; go on with: python siri.py --resume runs/x"
    assert latest_checkpoint(tmp_path / "runs/x").name == f"{done:05d}-0" and 2 <= done < 50


@slow
def test_a_second_signal_ends_a_run_at_once_and_what_was_saved_is_sound(tmp_path):
    process = start(tmp_path, *f"{SMALL} --groups 16 --warmup-max 50 --n-req 999 --panel 1".split())   # both find one iteration running
    wait_for(lambda: metrics(tmp_path), process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping after this iteration" in (tmp_path / "err.txt").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert re.search("siri: stopped at once.*--resume runs/x", (tmp_path / "err.txt").read_text().splitlines()[-1])
    assert damage(checkpoints(tmp_path / "runs/x")[0]) == ""


CONFIG_FLAGS = [flag(f.name) for f in dataclasses.fields(siri.Config)]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CONFIG_FLAGS), st.sampled_from(
    ["", "0", "1", "-1", "2", "1e9", "nan", "inf", "x", "true", "tiny", "webshop", "train", "..", "\n", "\0", "9" * 40, "é"])
    | st.text(max_size=5)), max_size=4))
def test_any_flags_are_accepted_or_refused_in_one_line(pairs):
    try:
        cfg, _ = resolve(parse_arguments([f"--{flag}={value}" for flag, value in pairs])[1])
        assert cfg.group_size >= 2 and cfg.max_steps > 0
    except UserError as error:
        assert str(error)


def test_no_room_and_no_permission_are_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
        assert re.search("runs/x: 0.00 GiB free.*make room", refusal(capsys, *SMOKE))
        assert list(tmp_path.iterdir()) == []
    Path("runs").write_text("a file")
    assert re.search("runs/x: cannot be written", refusal(capsys, *SMOKE))


def test_what_is_not_of_a_run_stays_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / "runs/x/notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert re.search("runs/x: holds other files .notes.txt.*--name", refusal(capsys, *SMOKE))
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
        refusal(capsys, *SMOKE)
    assert [p.name for p in notes.parent.iterdir()] == ["notes.txt"] and notes.read_text() == "mine"


def test_a_run_can_be_resumed_from_its_first_second(tmp_path, monkeypatch, capsys):
    """Interrupted at once while the base is evaluated; then resumed to the end, the base included."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(siri, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(f"{SMALL} --env-steps 1 --panel 2 --groups 1".split()) == 130
    assert "stopped at once; go on with: python siri.py --resume runs/x" in capsys.readouterr().err
    assert latest_checkpoint(Path("runs/x")).name == "00000"
    assert main(["--resume", "runs/x"]) == 0
    assert [r["label"] for r in json.loads(Path("runs/x/results.json").read_text())] == ["base", "final"]


def test_a_stop_before_the_first_checkpoint_promises_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = f"{SMALL} --env-steps 1 --panel 2 --groups 1".split()
    for stopped in ("run.save_checkpoint", "run.Policy"):
        with monkeypatch.context() as patch:
            patch.setattr(stopped, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert main(small) == 130
        assert "--resume" not in capsys.readouterr().err
    assert main(small) == 0                             # the name is still free


def test_what_has_been_evaluated_is_not_evaluated_again(tmp_path, monkeypatch, capsys):
    """Stopped in the first iteration: the base's evaluation is not repeated. Resumed twice after a finished run was granted
    more: nothing is played that has been."""
    monkeypatch.chdir(tmp_path)
    more = f"{SMALL} --env-steps 1 --panel 2 --groups 1 --mining-max 0 --distill-max 0".split()
    with monkeypatch.context() as patch:
        patch.setattr(siri, "play", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(more) == 130
    assert main(["--resume", "runs/x"]) == 0
    assert capsys.readouterr().out.count("\nbase ") == 1
    first = latest_checkpoint(Path("runs/x"))
    assert main(["--resume", "runs/x", "--env-steps", "0", "--warmup-max", "1"]) == 0
    assert "internalize ends" in capsys.readouterr().out
    last = latest_checkpoint(Path("runs/x"))
    assert last.name.split("-")[0] == first.name.split("-")[0] and last != first
    assert main(["--resume", "runs/x"]) == 0
    assert "ends after" not in capsys.readouterr().out and latest_checkpoint(Path("runs/x")) == last


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("00009-9", "00009-10", "00010-2", "100000-0", "00009", "writing", "00011-1.bak", "12x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["100000-0", "00010-2", "00009-10", "00009-9", "00009"]


def test_a_sound_checkpoint_is_not_taken_away_before_another_is_there(copied_run, monkeypatch):
    """The same state is not written again; a damaged one gives way; and what is not finite is not saved."""
    cfg = load_config(copied_run, {})
    newest = latest_checkpoint(copied_run)
    learner = siri.Learner.begin(cfg, make_environment(cfg), Policy(cfg, newest))
    load_checkpoint(learner, newest)
    assert newest.name == "00006-3" and learner.progress.finished
    gone = []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: gone.append(Path(path).name))
        save_checkpoint(copied_run, learner)
    assert gone == []
    spoil(newest / "skills.json", "cut")
    save_checkpoint(copied_run, learner)
    assert damage(newest) == "" and len(checkpoints(copied_run)) == 2
    learner.progress.iteration += 1
    shutil.copytree(copied_run, whole := Path("runs/y"))
    learner.cfg = dataclasses.replace(cfg, keep_phases=True)
    for learner.progress.iteration in (7, 8, 9):                # the ends of every phase stay, and the last two
        save_checkpoint(whole, learner)
    assert [path.name for path in checkpoints(whole)] == ["00009-3", "00008-3", "00006-3", "00006-2"]
    learner.cfg, learner.progress.iteration = cfg, 7
    moment = next(iter(learner.optimizer.state.values()))["exp_avg_sq"]
    for tensor, value in ((moment, math.inf), (learner.policy.trainable[0], math.nan), (learner.policy.trainable[0], math.inf)):
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor[0, 0] = value
        with pytest.raises(UserError, match="not finite.*--lr"):
            save_checkpoint(copied_run, learner)
        with torch.no_grad():
            tensor.copy_(before)
    assert latest_checkpoint(copied_run) == newest


@pytest.mark.parametrize("action", ["--resume", "--eval", "--report", "--play"])
@pytest.mark.parametrize("name", ["lock", "results.json.tmp", "config.json.tmp", "skills.json", "metrics.csv", "samples", "samples/0000.json",
                                  "checkpoints/writing", "report.html", "checkpoints/00006-3/progress.json"])
def test_nothing_outside_a_run_s_folder_is_reached_through_it(copied_run, capsys, tmp_path, action, name):
    """A folder from elsewhere may hold links, and pipes on which a reader would wait for ever."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "notes.txt").write_text("mine")
    for make in (lambda at: at.symlink_to(outside / "notes.txt"), lambda at: at.symlink_to(outside), os.mkfifo):
        path = copied_run / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        make(path)
        assert "is a link or a device" in refusal(capsys, action, str(copied_run))
    assert [(p.name, p.read_text()) for p in outside.iterdir()] == [("notes.txt", "mine")]


def test_a_manifest_names_files_of_its_own_checkpoint_only(copied_run, tmp_path):
    newest = latest_checkpoint(copied_run)
    (tmp_path / "x").write_text("x")
    manifest = json.loads((newest / "manifest.json").read_text())
    write_json(newest / "manifest.json", manifest | {"../../../../x": file_hash(tmp_path / "x")})
    assert "../../../../x" in damage(newest) and latest_checkpoint(copied_run) != newest


FULL = OSError(errno.ENOSPC, "No space left on device", "runs/x/somewhere")


@pytest.mark.parametrize("where, nth", [
    ("os.replace", 1), ("os.replace", 2), ("os.replace", 9), ("os.fsync", 12), ("safetensors.torch.save_file", 3),
    ("run.append_metrics", 2), ("run.add_result", 3), *(pytest.param(*more, marks=slow) for more in (
        ("os.replace", 5), ("os.replace", 12), ("os.fsync", 3), ("os.fsync", 20), ("safetensors.torch.save_file", 1),
        ("safetensors.torch.save_file", 6), ("run.append_metrics", 1), ("run.save_sample", 1), ("run.add_result", 1)))])
def test_a_full_disk_at_any_moment_ends_in_one_line_and_loses_nothing(tmp_path, monkeypatch, capsys, where, nth):
    from safetensors import SafetensorError
    monkeypatch.chdir(tmp_path)
    module, name = where.rsplit(".", 1)
    real, calls = getattr(importlib.import_module(module), name), itertools.count(1)

    def full(*args, **kwargs):
        if next(calls) >= nth:
            raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)") if name == "save_file" else FULL
        return real(*args, **kwargs)

    short = f"{SMALL} --panel 1 --groups 1 --group-size 2 --max-steps 2 --warmup-max 2 --mining-max 1 --distill-max 0 --save-every 1"
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        assert main(short.split()) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("siri: ") and "No space left" in err and not list(tmp_path.glob("runs/x/**/*.tmp"))
    if found := checkpoints(Path("runs/x")):
        assert found[0].name == "00000" or "then go on with --resume runs/x" in err
    assert main(["--resume", "runs/x"] if found else short.split()) == 0
    assert [r["label"] for r in json.loads(Path("runs/x/results.json").read_text())] == [
        "base", "after warm-up", "phase 1 plain", "phase 1 with skills", "final"]
    assert [int(row["iteration"]) for row in metrics(tmp_path)] == [0, 1, 2]


def test_a_full_disk_on_resuming_says_how_to_go_on(copied_run, monkeypatch, capsys):
    """Before an iteration is played: config.json and the bank are written when a run is resumed."""
    for name in ("config.json", "skills.json", "metrics.csv"):
        def full(path, text, name=name, write=write_text):
            if path.name == name:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            write(path, text)

        with monkeypatch.context() as patch:
            patch.setattr("tools.files.write_text", full)
            patch.setattr("run.write_text", full)
            err = refusal(capsys, "--resume", "runs/x")
        assert re.search(f"runs/x/{name}: No space left on device; make room there; then go on with --resume runs/x", err)
    assert main(["--resume", "runs/x"]) == 0


@pytest.mark.parametrize("change", ["removed", "begun again", "replaced by a link"])
def test_a_folder_that_is_another_one_by_now_is_not_written_to(tmp_path, monkeypatch, capsys, change):
    """Someone removed a live run's folder, and may have begun another of that name."""
    monkeypatch.chdir(tmp_path)
    play = siri.play

    def meanwhile(*args):
        play(*args)
        shutil.move("runs/x", "elsewhere")
        if change == "begun again":
            Lock(Path("runs/x") if Path("runs/x").mkdir() is None else None)
        elif change == "replaced by a link":
            Path("runs/x").symlink_to(tmp_path / "other")
            (tmp_path / "other").mkdir()

    monkeypatch.setattr(siri, "play", meanwhile)
    assert main(f"{SMALL} --panel 1 --groups 1 --group-size 2 --max-steps 2".split()) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "runs/x: was removed or replaced while this run used it" in err
    assert not Path("runs/x").exists() or {p.name for p in Path("runs/x").iterdir()} <= {"lock"}
    assert latest_checkpoint(Path("elsewhere")).name == "00000-0"


def test_an_evaluation_under_other_settings_does_not_replace_the_run_s_own(copied_run, capsys):
    before = json.loads((copied_run / "results.json").read_text())
    for more in ([], ["--max-steps", "3"], ["--eval-temperature", "0"], [], ["--history", "1"]):
        assert main(["--eval", "runs/x", "--panel", "2", *more]) == 0
    after = json.loads((copied_run / "results.json").read_text())
    assert after[:len(before)] == before and len(after) == len(before) + 4
    assert {r["settings"]["max_steps"] for r in after} == {14, 3} and after[-1]["settings"]["model"] == TINY


@slow
def test_the_program_runs_in_a_thread_and_leaves_the_signals_alone(copied_run):
    before = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(main, ["--resume", "runs/x", "--distill-max", "4"]).result() == 0
    assert main(["--eval", "runs/x", "--panel", "1"]) == 0
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == before


@slow
@pytest.mark.parametrize("how", [">&-", "2>&-", ">&- 2>&-", "| head -1", "</dev/null"])
def test_nobody_has_to_listen(tmp_path, how):
    """A closed output, or a reader that goes away, costs no run."""
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'siri.py'))}"
    small = f"{SMALL} --panel 1 --groups 1 --group-size 2 --max-steps 2 --warmup-max 1 --mining-max 0 --distill-max 0"
    done = subprocess.run(f"{command} {small} {how}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr + done.stdout
    if how == "| head -1":                          # it ends with its reader, soon or late
        again = "--resume runs/x" if checkpoints(tmp_path / "runs/x") else small
        done = subprocess.run(f"{command} {again}", shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "runs/x/results.json").read_text())) == 5


def test_text_of_others_does_not_drive_the_terminal(copied_run, capsys):
    """Names of folders, categories and skills hold escape codes here."""
    codes = "\x1b]0;owned\x07\x1b[2J\u202e"
    data = json.loads((copied_run / "results.json").read_text())
    data[-1]["label"] = data[-1]["panel"] = f"final{codes}"
    data[-1]["kinds"] = {f"kind{codes}": kind for kind in data[-1]["kinds"].values()}
    write_json(copied_run / "results.json", data)
    assert main(["--resume", "runs/x"]) == 0
    (copied_run / "skills.json").unlink()
    shutil.move(copied_run, f"runs/x{codes}")
    assert main(["--eval", f"runs/x{codes}", "--panel", "1", "--model", f"no{codes}"]) == 2
    assert main(["--resume", f"runs/y{codes}"]) == 2
    out = capsys.readouterr()
    assert "final" in out.out and "runs/y" in out.err and not set(codes[:1] + codes[9:11] + codes[-1:]) & set(out.out + out.err)


def test_all_that_is_printed_goes_through_one_door():
    for name in ("run", "siri", "policy", "tools.files", "tools.metrics", "tools.play", "tools.report", "tools.compare", "tools.settings"):
        tree = ast.parse((HERE / f"{name.replace('.', '/')}.py").read_text())
        calls = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in ("print", "tqdm.write")]
        assert calls == [], name


def test_a_file_of_metrics_without_its_first_row_gets_a_header(copied_run):
    """As one that was made when the disk was full."""
    path = copied_run / "metrics.csv"
    rows = metrics(copied_run.parents[1])
    path.write_bytes(b"")
    for row in rows:
        append_metrics(copied_run, row)
    assert metrics(copied_run.parents[1]) == rows

# ---- 3. What no text and no file may do ------------------------------------------------------------------------------


SHRAPNEL = ["<think>", "</think>", "<action>", "</action>", "<ACTION>", "<skill>", "</skill>", "<|im_end|>", "<|im_start|>",
            "<|endoftext|>", "<pad>", "<|im_", "end|>", "<", "|>", "|", "->", "when ", "do ", "look", "inventory", "search[", "click[",
            "]", "lamp", "next >", "features", "\n", "\t", " ", "\0", "\x1c", "\u2028", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800",
            "\udfff", "\ufffd", "İ", "ß", "Σ", "２", "🍎", "e\u0301", "<b class='x'>", "&lt;action&gt;", "<!--", "{goal}", "{0}",
            "%s", "\\", "\\u003c", "#look#", " [SEP] ", "None", "'", '"']
WORDS = st.sampled_from(SHRAPNEL) | st.text(st.characters(), max_size=4)                # with lone surrogates
SHORT = st.lists(WORDS, max_size=8).map("".join)
LONG = st.lists(WORDS, min_size=1, max_size=4).map(lambda parts: ("".join(parts) * 10_000)[:10_000])
TEXT = st.one_of(*[SHORT] * 15, LONG)


@pytest.fixture(scope="module")
def open_games(home):
    """A household and a shop kept open, and the states of a walk through each."""
    shop = envs.WebShop(generated_shop(), "made up")
    with home.open(home.tasks("train")[0]) as household, shop.open(shop.tasks("test")[0]) as shopping:
        bought = ["search[lamp]", "click[next >]", None, None, "click[features]", "click[< prev]"]
        states = [shopping.start]
        for action in bought:
            states.append(shopping.step(states[-1], action or states[-1].admissible[-1 if len(states) == 3 else 2]))
        yield {"alfworld": (household, play(household, seed=1, length=6)), "webshop": (shopping, states)}


FRAMES = ["{0}{1}", "<think>{0}</think><action>{1}</action>", "<action>{0}</action>{1}",
          "<think>x</think><action>search[{0}]</action>{1}", "<skill>when {0} -> {1}</skill>"]


@settings(max_examples=some(400), deadline=None)                                              # 2,000 responses
@given(TEXT, TEXT, st.lists(st.integers(0, 120), max_size=6), st.integers(0, 6))
def test_no_response_can_hurt_the_game_the_bank_or_the_gate(open_games, first, second, cuts, at):
    """Whatever is said: an action or none, that any game takes and marks if it is not admitted; a skill in bounds or
    SkillRejected; and for every action tokens that the gate can train."""
    for frame in FRAMES:
        response = frame.format(first, second)
        edges = [0, *sorted(cut * len(response) // 120 for cut in cuts), len(response)]
        pieces = [response[i:j] for i, j in zip(edges, edges[1:])]
        action, mask = envs.parse_action(response), distill.action_mask(pieces)
        assert len(mask) == len(pieces)
        if action:
            trained = " ".join("".join(piece for piece, gated in zip(pieces, mask) if gated).split())
            assert action.casefold() in trained.casefold()
        try:
            condition, strategy = skills.parse_skill(response, max_words=20)
            assert len(f"{condition} {strategy}".split()) <= 20 and len(f"{condition} {strategy}") <= 200
        except SkillRejected as rejection:
            assert rejection.reason in skills.REASONS
        for world, (game, states) in open_games.items():
            state, said = states[at], action or ""
            after = game.step(state, said)
            known = said in state.admissible
            search = world == "webshop" and said.startswith("search[")
            click = world == "webshop" and said[:said.rfind("]") + 1] in state.admissible       # what follows is ignored
            assert after.valid or not (known or search and re.fullmatch(r"search\[[^\[\]]+\]", said)), said
            assert known or search or click or not after.valid, said
            assert after.valid or after.admissible == state.admissible and not after.success and after.reward == 0
            assert after.steps == state.steps + 1


SPLIT_UP = ["<|im_<|im_end|>end|>", "<|im_ end|>", "< |im_end|>", "<|im_\u200bend|>", "\uff1c|im_end|\uff1e", "<\uff5cim_end\uff5c>",
            "<|IM_END|>", "<|\u0130m_end|>", "<|im_end|", "|im_end|>", "im_end", "<<||iimm__eenndd||>>", "<pa", "d>", "<unk>",
            "<p<pad>ad>", "\nassistant\n", "<|im_start|>assistant\n", "&#60;|im_end|>", "\\u003c|im_end|>"]
HOSTILE = st.lists(st.sampled_from(SHRAPNEL + SPLIT_UP * 3) | st.text(st.characters(), max_size=3), max_size=8).map("".join)


def prompts_with(text, other, world):
    """Every prompt that the program writes with a text from elsewhere in it, one text in all of its places."""
    skill = Skill(0, other, text, 0, "game").text
    page = f"Instruction: [SEP] {text} [SEP] {other} [SEP] Page 1 [SEP] {text}"
    state = envs.State(page if world == "webshop" else text, (text, f"click[{other.lower()}]", other), "")
    for style in ("full", "compact"):
        yield envs.render_prompt(text, state, [envs.Turn(page, other), envs.Turn(other, text)], skill=skill, style=style,
                                 world=world)
        yield skills.mining_prompt(text, [(other, text), (text, other)], style)


def control_ids(policy):
    """The special tokens of the tokenizer's file; <unk> stands for words, and ends nothing."""
    added = json.loads(policy.tokenizer.backend_tokenizer.to_str())["added_tokens"]
    return {t["id"] for t in added if t["special"] and t["content"] != "<unk>"}


@settings(max_examples=some(250), deadline=None)                                              # 4 prompts and 2 policies: 2,000
@given(HOSTILE, HOSTILE, st.sampled_from(["alfworld", "webshop"]))
@pytest.mark.parametrize("name", ["policy", "stranger"])
def test_no_task_page_command_or_skill_adds_a_control_token(request, name, text, other, world):
    policy = request.getfixturevalue(name)
    control = control_ids(policy)
    for hostile, harmless in zip(prompts_with(text, other, world), prompts_with("apple", "desk", world)):
        ids, same = ([i for i in policy.encode(prompt) if i in control] for prompt in (hostile, harmless))
        assert ids == same and len(ids) > 0, hostile


@settings(max_examples=some(300), deadline=None)
@given(st.lists(st.tuples(HOSTILE, HOSTILE), max_size=6), st.integers(1, 9))
def test_a_bank_of_any_accepted_skills_comes_back_from_its_file(pairs, longest):
    bank = new_bank()
    for condition, strategy in pairs:
        try:
            skill = bank.add(*skills.parse_skill(f"<skill>when {condition} -> {strategy}</skill>", max_words=longest), 0, condition)
            assert len(f"{skill.condition} {skill.strategy}".split()) <= longest and "\n" not in skill.text
            bank.retrieve(strategy)
        except SkillRejected as rejection:
            bank.reject(rejection.reason)
    assert SkillBank.from_json(json.loads(json.dumps(bank.to_json()))) == bank


class Parrot:
    """In the place of `Policy`: one real policy for all calls, which shops by rote and does nothing in a household."""

    def __init__(self, policy):
        self.policy, self.real = policy, Policy

    def __call__(self, cfg, adapter=None, ranks=None):
        self.policy.cfg = cfg
        self.policy.generate = self.speak
        return self.policy

    def speak(self, prompts, *_):
        texts = map(self.policy.tokenizer.decode, prompts)
        return [self.policy.tokenizer(f"<think>x</think><action>{self.choose(text)}</action>",
                                      add_special_tokens=False).input_ids for text in texts]

    def choose(self, text):
        """Search, open the first product, choose its last option, buy."""
        step = int((re.findall(r"Step (\d+)\. You now see the page", text) or ["0"])[-1])
        offered = re.findall(r"'(click\[.*?\])'", text.rpartition("You can take one of these actions")[2])
        return {0: "look", 1: "search[lamp]", 2: (offered * 3 + [""] * 3)[2], 3: (offered or [""])[-1]}.get(step, "click[buy now]")


GONE = object()
ATOMS = st.sampled_from([None, True, False, 0, 1, -1, 2, 3, 2.5, -0.5, math.nan, math.inf, 10**20, 10**400, "", "x", "1", "\ud800",
                         "\n", "<|im_end|>", "$", "candidate", "train", "webshop", [], {}, GONE, GONE, GONE])
VALUES = ATOMS | st.lists(ATOMS.filter(lambda x: x is not GONE), max_size=2) | st.just({"a": [1]}) | st.just([[[]]])
SPOTS = st.lists(st.tuples(st.lists(st.integers(0, 99), max_size=5), VALUES), min_size=1, max_size=2)
FILES_LIKE = ["", "{", "null", "3", "[]", "\"x\"", "NaN", "\0", "[" * 100_000, "{\"a\": " * 100_000, "9" * 5000, "\ud800"]


def replaced(data, path, value):
    """A copy of a JSON value whose part at `path` (numbers, modulo what there is) is `value`, or has that added, or is gone."""
    if not path or not isinstance(data, (dict, list)) or not data:
        return {**data, "extra": value} if isinstance(data, dict) and value is not GONE else value
    new = copy.copy(data)
    key = (list(data) if isinstance(data, dict) else range(len(data)))[path[0] % len(data)]
    new[key] = replaced(data[key], path[1:], value)
    if new[key] is GONE:
        del new[key]
    return new


@st.composite
def damaged_json(draw, data):
    """The text of a JSON file that once held `data`: other values at one or two places, or a torn file, or another one."""
    how = draw(st.integers(0, 9))
    if how == 0:
        return draw(st.sampled_from(FILES_LIKE))
    text = json.dumps(data)
    if how == 1:
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(st.sampled_from(["", "\0", "}", "NaN", ",", "\"", "é", "1e999"])) + text[at + draw(st.integers(0, 9)):]
    for path, value in draw(SPOTS):
        data = replaced(data, path, value)
    return "" if data is GONE else json.dumps(data)


def write_damaged(path, text):
    path.unlink(missing_ok=True)                                # others may share the file by a hard link
    path.write_bytes(text.encode(errors="surrogatepass"))


def fresh(template, folder):
    """A new copy of a run. Files are shared: the program replaces them, and never writes into one but metrics.csv."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, copy_function=os.link)
    for name in ("lock", "metrics.csv", "results.json"):
        (folder / name).unlink()
        shutil.copy(template / name, folder / name)
    return folder


def works_or_says_why(done, *names):
    """The promise of every call: it works, or one line says which file (or setting) is at fault."""
    if done.code != 0:
        assert done.code == 2 and re.fullmatch(r"siri: .*\n", done.err), done.err
        assert any(name in done.err for name in names), done.err
    return done.code == 0


@pytest.fixture(scope="class")                  # made anew for every test: no other may meet the parrot
def parked_run(runs, tmp_path_factory):
    """A run that has one small iteration to go, and the parrot for its policy."""
    root = tmp_path_factory.mktemp("parked")
    shutil.copytree(runs[0] / "runs/x", root / "template")
    config_file, last = root / "template/config.json", latest_checkpoint(root / "template")
    saved = json.loads(config_file.read_text()) | dict(groups=1, group_size=2, max_steps=2, panel=2, distill_max=4,
                                                       invalid_penalty=0.0, save_every=9)
    write_json(config_file, saved)
    write_json(last / "progress.json", json.loads((last / "progress.json").read_text()) | {"finished": False})
    sign(last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run.Policy", Parrot(Policy(load_config(root / "template", {}), last)))
        assert works_or_says_why(call("--resume", fresh(root / "template", root / "x")))
        assert works_or_says_why(call("--eval", root / "x", "--with-skills"))
        yield root


def sign(checkpoint):
    """Make the manifest agree with the files as they are."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    write_json(checkpoint / "manifest.json", {name: file_hash(checkpoint / name) for name in manifest})


@settings(max_examples=some(100), deadline=None)
@given(st.data())
def test_any_config_file_works_or_is_named(parked_run, data):
    folder = fresh(parked_run / "template", parked_run / "x")
    saved = json.loads((folder / "config.json").read_text())
    text = data.draw(damaged_json(saved))
    write_damaged(folder / "config.json", text)
    works_or_says_why(call("--eval", folder), "config.json", "siri: --")


@settings(max_examples=some(100), deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name, action, more", [("skills.json", "--eval", ["--with-skills"]), ("progress.json", "--resume", [])])
def test_any_checkpoint_file_works_or_is_named(parked_run, data, name, action, more):
    folder = fresh(parked_run / "template", parked_run / "x")
    last = latest_checkpoint(folder)
    write_damaged(last / name, data.draw(damaged_json(json.loads((last / name).read_text()))))
    sign(last)
    works_or_says_why(call(action, folder, *more), name)


@slow
@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["config.json", "results.json", "samples/0000.json", "adapter_config.json", "progress.json", "skills.json"])
def test_any_run_is_taken_home_or_its_file_is_named(runs, tmp_path_factory, data, name):
    root = tmp_path_factory.mktemp("home")
    folder = fresh(runs[0] / "runs/x", root / "x")
    last = latest_checkpoint(folder)
    path = folder / name if (folder / name).exists() and name != "skills.json" else last / name
    write_damaged(path, data.draw(damaged_json(json.loads(path.read_text()))))
    sign(last)
    works_or_says_why(call("--export", folder, "--to", root / "out"), path.name, "siri: --")
    assert not (root / "out.writing").exists()
    shutil.rmtree(root)


@st.composite
def damaged_game(draw, data):
    """The text of a game file, torn or with other values, or a word of its PDDL or grammar in the place of another."""
    if draw(st.booleans()):
        return draw(damaged_json(data))
    part = draw(st.sampled_from(["pddl_problem"] * 7 + ["pddl_domain"] * 4 + ["grammar"]))
    tokens = re.findall(r"\w+|\s+|.", data[part])
    for at, other in draw(st.lists(st.tuples(st.integers(0, len(tokens) - 1), st.integers(0, len(tokens) - 1)), min_size=1, max_size=3)):
        tokens[at] = draw(st.sampled_from(["", "(", ")", "\0", "\ud800", "?x", "not"] + [tokens[other]] * 7))
    return json.dumps({**data, part: "".join(tokens)})


@pytest.fixture(scope="module")
def household_folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("data"))
    return folder, next((folder / "json_2.1.1/train").glob("**/game.tw-pddl"))


@settings(max_examples=some(100), deadline=None)
@given(st.data())
def test_any_game_file_works_or_is_named(parked_run, household_folder, data):
    folder, file = household_folder
    sound = json.loads((next((folder / "json_2.1.1/valid_seen").glob("**/game.tw-pddl"))).read_text())
    write_damaged(file, data.draw(damaged_game(sound)))
    done = call("--eval", fresh(parked_run / "template", parked_run / "x"), "--no-compact", "--alfworld-data", folder, "--split", "train")
    works_or_says_why(done, str(file), f"no ALFWorld games in {file.parents[2]}", f"{file.parent.name} is not a sound ALFWorld game")
    lost = [line for line in done.out.splitlines() if "is lost" in line]
    assert all(re.search(r"train/\S+ is not a sound ALFWorld game", line) for line in lost), lost


@settings(max_examples=some(100), deadline=None)
@given(st.data(), st.sampled_from(["items_shuffle_1000", "items_ins_v2_1000", "items_human_ins"]))
def test_any_shop_file_works_or_is_named(parked_shopper, data, name):
    folder = write_shop(parked_shopper)
    sound = json.loads((folder / f"{name}.json").read_text())
    write_damaged(folder / f"{name}.json", data.draw(damaged_json(sound)))
    config = fresh(folder / "template", folder / "x") / "config.json"
    goals = "human" if name == "items_human_ins" else "synthetic"
    write_json(config, json.loads(config.read_text()) | dict(webshop_goals=goals))
    done = call("--eval", folder / "x", "--webshop-data", folder)
    works_or_says_why(done, name.removesuffix("_1000"), "goals are too few")
    assert "is lost" not in done.out, done.out


@pytest.fixture(scope="class")                  # made anew for every test: no other may meet the parrot
def parked_shopper(parked_run, stranger_folder, tmp_path_factory):
    """A run that shops, its policy one that can say anything, and the folder for the shop's files."""
    root = tmp_path_factory.mktemp("shop")
    shutil.copytree(parked_run / "template", root / "template")
    cfg = stranger_config(stranger_folder, env="webshop", webshop_split="release", webshop_tagger="stop-list", max_steps=5,
                          groups=2, max_prompt=9999, variant="gigpo")
    write_json(root / "template/config.json", dataclasses.asdict(cfg))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(envs.SHOP_SPLITS, "release", {"train": (2, None), "validation": (0, 2), "test": (0, 2)})
        patch.setattr("run.Policy", Parrot(Policy(cfg)))
        yield root


def test_an_option_with_two_blanks_can_be_chosen_as_an_answer_writes_it():
    """WebShop puts blanks around a slash, so that "a / b" gets two on each side; `parse_action` leaves one."""
    odd = article("lamp", "Lamp", "$5.00", {"Color": ["Black / White", "black | white"], "Size": ["6  wide"]}, [], "Shines.")
    game = visit(goal_of(LAMP, shop=(shop := shop_of([odd]))), shop)
    state = walk(game, "search[lamp]", f"click[{LAMP.lower()}]")
    assert {"click[black  |  white]", "click[black | white]", "click[6  wide]"} <= set(state.admissible)
    for offered, kept in (("click[6  wide]", "6  wide"), ("click[black | white]", "black | white")):
        action = envs.parse_action(f"<think>x</think><action>{offered}</action>")
        state = game.step(state, action)
        assert state.valid and dict(state.engine.chosen)[{"6": "size"}.get(kept[0], "color")] == kept
    assert dict(game.step(state, "click[black  |  white]").engine.chosen)["color"] == "black  |  white"


def test_a_zero_byte_in_a_game_does_not_end_the_process(tmp_path):
    """Fast Downward's C++ half calls exit() on input that it cannot read."""
    world = envs.AlfWorld.official(make_folder(tmp_path, lambda text: text.replace("(:init", "(:init (isClean \\u0000)")))
    with pytest.raises(ValueError, match="zero byte"):
        world.open(world.tasks("train")[0])


def test_the_help_fits_80_columns_and_shows_the_defaults_in_force(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    texts = []
    for args in (["--help", "--preset", "paper", "--env", "webshop"], ["--preset", "tiny", "--help"]):
        with pytest.raises(SystemExit):
            main(args)
        texts.append(capsys.readouterr().out)
        assert max(map(len, texts[-1].splitlines())) <= 80 and texts[-1].count("  python siri.py --") == 3
    for text, default, lr in zip(texts, ("4096", "512"), ("3e-06", "0.001")):
        said = " ".join(text.split())
        assert f"never the skill [R] (default {default})" in said and f"AdamW learning rate [R] (default {lr})" in said
    assert main(["--help", "--env", "webshp"]) == 2 and "--env webshp: must be one of alfworld, webshop" in capsys.readouterr().err


README_COMMANDS = re.findall(r"^(?:python siri\.py --(?:report|resume|eval|play|export|probe|help)).*$", (HERE / "README.md").read_text(), re.M)


def test_the_readme_has_a_command_for_all_that_is_done_with_a_run():
    assert len(README_COMMANDS) == 9


@pytest.mark.parametrize("command", README_COMMANDS)
def test_a_command_of_the_readme_runs(copied_run, monkeypatch, command):
    """As it stands, but for names of folders, in few games; the trainings and the two set-ups are run by others."""
    shutil.copytree("runs/x", "runs/A")
    shutil.copytree("runs/x", "runs/B")
    monkeypatch.setattr("sys.stdin", io.StringIO("q\n"))
    words = shlex.split(command, comments=True)[2:]
    words = [{"runs/NAME": "runs/x", "FOLDER": str(HERE / TINY) if "--probe" in words else "home"}.get(word, word) for word in words]
    words += ["--panel", "1"] if "--eval" in words else ["--preset", "tiny"] if "--probe" in words else []
    monkeypatch.setattr(probe, "STATES", 2)
    monkeypatch.setattr(probe, "WINS", 1)
    with pytest.raises(SystemExit) if "--help" in words else contextlib.nullcontext():
        assert main(words) == 0
