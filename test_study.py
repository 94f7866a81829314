"""The study: its grid, copies of runs, the statistics, and what pages show of it."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

import envs
import siri
from conftest import HERE, bank_with, slow
from policy import UserError
from tools import evidence, study
from tools.files import checkpoints, load_results, write_json

# ---- 1. the grid -----------------------------------------------------------------------------------------------------


def test_every_cell_comes_after_what_it_needs_and_once():
    cells = study.grid([*study.WORLDS], [*study.PLAN], None)
    asked_of_both = [variant for variant in study.PLAN if variant not in study.PUZZLE]
    assert len(cells) == len(set(cells)) == len(asked_of_both) * 8 + len(study.PUZZLE) * 5
    for i, cell in enumerate(cells):
        assert set(cell.needs()) <= set(cells[:i]), cell
    part = study.grid(["webshop"], ["gigpo_compute"], [7])
    assert [c.variant for c in part] == ["siri", "gigpo", "gigpo_compute"] and {c.seed for c in part} == {7}


def test_every_variant_of_the_method_is_in_the_grid_and_has_a_meaning():
    assert set(siri.VARIANTS) <= set(study.PLAN)
    assert set(study.PLAN) - set(evidence.MEANING) - set(study.PUZZLE) == {"untrained"}                 # a helper of no_mining
    assert set(study.PUZZLE) | {"no_advantage"} == {"stray", *(name for forms in evidence.PUZZLE.values() for name in forms)}
    for name, part in study.PLAN.items():
        if name in siri.VARIANTS and name != "siri":
            assert f"--variant {name} " in part.flags + " "


@pytest.mark.parametrize("argv, says", [
    (["--seeds", "1-"], "--seeds 1-: give numbers"), (["--variants", "siri,best"], "--variants best: must be one of siri"),
    (["--worlds", "moon"], "--worlds moon"), (["--jobs", "0"], "--jobs 0"), (["--seeds", "5-3"], "--seeds 5-3"), (["--repeat", "alfworld/siri"], "is no cell of the grid"),
    (["--trial", "siri=:--lr 1"], "with a new name"), (["--trial", "new=later:--lr 1"], "AT one of")])
def test_bad_input_is_one_line(tmp_path, capfd, argv, says):
    assert study.main([*argv, "--folder", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_truthful_bank_is_what_the_worlds_habits_are():
    home = envs.Household(3).habit
    assert study.oracle_bank(study.Cell("alfworld", "oracle_skill", 3)) == [
        f"when the task needs {thing.lower()} -> look in {place.lower()} first" for thing, place in home.items()]
    items, instructions = envs.generate_catalogue(4, 450)
    makers = dict(line.removeprefix("when the task needs ").split(" -> ") for line in
                  study.oracle_bank(study.Cell("webshop", "oracle_skill", 4)))
    right = [makers[wish].split()[2] == item["name"].split()[0].lower() for item in items
             if "instruction" in instructions[item["asin"]] for wish in instructions[item["asin"]]["attributes"]]
    assert len(makers) == 12 and 0.9 < np.mean(right) < 1                           # loyalty is .95


# ---- 2. runs and copies ----------------------------------------------------------------------------------------------


def test_a_run_can_be_copied_as_it_was_when_a_phase_ended_or_began(tmp_path):
    """Copies hold what was measured until then, and nothing later."""
    whole = tmp_path / "whole"
    for name in ("00000", "00000-0", "00003-0", "00003-1", "00005-1", "00005-2", "00006-2", "00006-3"):
        (whole / "checkpoints" / name).mkdir(parents=True)
    rates = dict(n=4, successes=2, success=0.5, interval=[0.1, 0.9], mean_steps=3.0, invalid_rate=0.0)
    (whole / "results.json").write_text(json.dumps([
        dict(rates, label=label, iteration=i, panel="p", skills=False, kinds={}, outcomes={})
        for label, i in (("base", 0), ("after warm-up", 3), ("phase 1 plain", 5), ("final", 6))]))
    for name in ("config.json", "metrics.csv"):
        (whole / name).write_text("{}")
    for at, name, labels in (("before mining", "00003-0", 2), ("mining", "00003-1", 2), ("internalize", "00005-2", 3), ("end", "00006-3", 4)):
        study.branch(whole, at, tmp_path / at)
        assert [path.name for path in checkpoints(tmp_path / at)] == [name] and len(load_results(tmp_path / at)) == labels, at
    for path in checkpoints(whole)[:4]:
        path.rmdir()
    with pytest.raises(UserError, match="has no checkpoint of internalize"):
        study.branch(whole, "internalize", tmp_path / "other")


def test_weights_are_counted_over_what_passes_the_gate(tmp_path):
    """Steps of weight 1, 1/4 and 0 and of 1, 3 and 2 tokens, and one whose pair says that the skill did harm."""
    checkpoint = tmp_path / "checkpoints" / "00005-2"
    checkpoint.mkdir(parents=True)
    write_json(tmp_path / "config.json", dict(preset="smoke", env="alfworld", a_max=2.0, lambda_max=3.0, pair_gain=True))
    bank = bank_with("apple")
    bank.record(bank.skills[0], 1.0, 0)
    write_json(checkpoint / "skills.json", bank.to_json())
    steps = [siri.GuidedStep([1], [5] * n, [True] * n, advantage, 0, effect)
             for n, advantage, effect in ((1, 2.0, 1.0), (3, 0.5, 1.0), (2, -1.0, 1.0), (2, 2.0, -1.0))]
    write_json(checkpoint / "progress.json", dict(guided=[[dataclasses.asdict(step) for step in steps]]))
    assert [row.weight for row in study.gated_rows(tmp_path)] == [1.0, 0.25, 0.0]
    assert float(study.mean_lambda(tmp_path)) == 3 * (1 * 1 + 3 * 0.25) / 6


class Scripted(study.Study):
    """A study whose cells are short scripts."""

    script = "import time; time.sleep(0.1)"

    def start(self, cell):
        log = self.run(cell).with_suffix(".log")
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as out:
            return subprocess.Popen([sys.executable, "-c", self.script.replace("CELL", str(cell))], stdout=out, stderr=out)


TOLD = dict(evaluations=[dict(label="final", iteration=2, panel="p", env_steps=9, won="0110", invalid_rate=0.1, mean_steps=4.5)],
            rows=dict(phase=[0, 1], env_steps=[4, 9], train_tokens=[10, 20], seconds=[1.0, 2.5]), evaluation_s=1.0, peak_gib=1.0, bank=[], covered="0")


def test_cells_are_run_once_and_a_failure_stops_only_what_needs_it(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(study, "told", lambda folder, plan: dict(TOLD, plan=plan))
    cells = study.grid(["alfworld"], ["gigpo_compute", "no_gate"], [0, 1])
    Scripted.script = "import sys; print('full disk'); sys.exit('CELL' == 'alfworld/gigpo/1')"
    failed = study.Work(Scripted(tmp_path, "smoke"), cells, 2).go()
    assert sorted(map(str, failed)) == ["alfworld/gigpo/1", "alfworld/gigpo_compute/1"]
    assert "alfworld/gigpo/1: its run ended with 1: full disk" in (said := capfd.readouterr()).err and "left, eta" in said.out
    now = study.machine() | dict(commit="0123456789")                                   # of the same code and settings
    monkeypatch.setattr(study, "machine", lambda: now)
    again = Scripted(tmp_path, "smoke")
    assert len(again.data["cells"]) == 6 and again.data["commit"] == "0123456"
    started = []
    monkeypatch.setattr(Scripted, "start", lambda self, cell, start=Scripted.start: started.append(str(cell)) or start(self, cell))
    Scripted.script = "pass"
    assert study.Work(again, cells, 2).go() == [] and started == ["alfworld/gigpo/1", "alfworld/gigpo_compute/1"]
    for change, says in ((dict(PLAN=study.PLAN | dict(no_gate=study.Part("--lr 1", "internalize"))), "another plan of alfworld/no_gate"),
                         (dict(fingerprint=lambda: "other code"), "another code")):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(study, name, value)
            with pytest.raises(UserError, match=f"is of {says}.*another --folder"):
                Scripted(tmp_path, "smoke")


def test_whatever_a_run_says_ends_no_study_and_a_lost_game_is_no_result(tmp_path, monkeypatch, capfd):
    """A cell that can't be begun, or whose run says what is no result, fails; the others go on."""
    says = iter([UserError("3 games of its evaluations were lost"), TOLD])

    def told(folder, plan):
        said = next(says)
        if isinstance(said, UserError):
            raise said
        return dict(said, plan=plan)

    monkeypatch.setattr(study, "told", told)
    Scripted.script = "pass"
    cells = study.grid(["alfworld"], ["siri"], [0, 1])
    assert study.Work(Scripted(tmp_path, "smoke"), cells, 1).go() == cells[:1]
    assert "alfworld/siri/0: 3 games" in capfd.readouterr().err and len(evidence.read(tmp_path / "study.json")["cells"]) == 1
    monkeypatch.setattr(Scripted, "start", study.Study.start)
    lost = study.Work(Scripted(tmp_path, "smoke"), study.grid(["alfworld"], ["no_gate"], [1]), 1).go()
    assert [c.variant for c in lost] == ["no_gate"] and "siri-seed1: has no checkpoint of internalize" in capfd.readouterr().err


def test_a_run_that_outlived_its_study_is_left_to_end_and_takes_a_place(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "told", lambda folder, plan: dict(TOLD, plan=plan))
    Scripted.script = "pass"
    first, second = study.grid(["alfworld"], ["siri"], [0, 1])
    work = study.Work(Scripted(tmp_path, "smoke"), [first, second], 1)
    (tmp_path / "runs").mkdir()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", first.name]) as orphan:
        (tmp_path / "runs" / f"{first.name}.pid").write_text(str(orphan.pid))
        assert work.alive() == [first]
        work.begin()
        assert work.running == {} and work.waiting == [first, second]
        orphan.kill()
    assert work.go() == [] and len(work.done) == 2


@slow
def test_a_small_study_survives_a_kill_and_a_cell_repeats_to_the_byte(tmp_path):
    command = [sys.executable, str(HERE / "tools/study.py"), "--preset", "smoke", "--folder", str(tmp_path), "--worlds", "alfworld",
               "--seeds", "3", "--variants", "gigpo_compute,no_gate,distill_plain,oracle_skill,no_mining"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as begun:
        for line in begun.stdout:
            if " done  alfworld/siri/3" in line:
                os.killpg(begun.pid, signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = evidence.read(tmp_path / "study.json")["cells"]
    assert len(cells) == 8
    assert cells["alfworld/oracle_skill/3"]["bank"][0]["text"].startswith("when the task needs apple -> look in")
    assert cells["alfworld/gigpo_compute/3"]["rows"]["train_tokens"][-1] >= cells["alfworld/siri/3"]["rows"]["train_tokens"][-1]
    assert not cells["alfworld/distill_plain/3"]["bank"] and max(cells["alfworld/distill_plain/3"]["rows"]["phase"]) == 2
    again = subprocess.run([*command[:2], "--preset", "smoke", "--folder", str(tmp_path), "--repeat", "alfworld/no_gate/3"],
                           capture_output=True, text=True)
    assert again.returncode == 0 and "the same, game by game" in again.stdout, again.stdout + again.stderr


# ---- 3. statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df, at_975, at_80", [(1, 12.706, 1.376), (2, 4.303, 1.061), (4, 2.776, 0.941), (30, 2.042, 0.854)])
def test_students_t_is_that_of_the_tables(df, at_975, at_80):
    assert evidence.quantile(0.975, df) == pytest.approx(at_975, abs=1e-3) and evidence.quantile(0.8, df) == pytest.approx(at_80, abs=1e-3)
    assert evidence.two_sided(at_975, df) == pytest.approx(0.05, abs=1e-4)


def test_an_estimate_over_seeds_by_hand():
    e = evidence.across_seeds([0.1, 0.3])                               # mean .2, sd .1414, standard error .1
    assert (e.mean, e.low, e.high) == pytest.approx((0.2, 0.2 - 1.2706, 0.2 + 1.2706), abs=1e-3)
    assert e.missed == pytest.approx(0.1 * (12.706 + 1.376), abs=1e-3) and e.p == pytest.approx(1 - 2 / math.pi * math.atan(2), abs=1e-4)
    assert all(math.isnan(evidence.across_seeds(values).p) for values in ([], [0.2], [0.1, 0.1]))


def test_the_interval_covers_and_the_test_errs_as_often_as_it_says():
    """Runs of the same worth, each with luck of its own and 120 games: in 5% of studies of five seeds the interval misses 0."""
    rng, missed, games_missed = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        rates = np.clip(0.7 + 0.06 * rng.standard_normal((2, 5)), 0, 1)
        won = rng.binomial(120, rates) / 120
        e = evidence.across_seeds([*(won[0] - won[1])])
        missed += not e.low < 0 < e.high
        pooled = won.mean(axis=1)                                       # as if all 600 games were independent
        games_missed += abs(pooled[0] - pooled[1]) > 1.96 * math.sqrt(2 * 0.7 * 0.3 / 600)
    assert 30 < missed < 70 < 150 < games_missed                        # 50 are expected; games alone would err in many more


def test_holms_correction_by_hand():
    assert evidence.holm([0.2, 0.01, math.nan, 0.02]) == pytest.approx([0.2, 0.03, math.nan, 0.04], nan_ok=True)
    assert evidence.holm([0.9, 0.8]) == [1.0, 1.0]


# ---- 4. tables and pages ---------------------------------------------------------------------------------------------


def made_up(worlds=("alfworld", "webshop")):
    """A study of two seeds with random games."""
    cells, rng = {}, random.Random(0)
    for world in worlds:
        for variant in dict.fromkeys([*evidence.MEANING, *study.PUZZLE]):
            for seed in (0, 1):
                evaluations = [dict(label=label, iteration=i, panel="p", env_steps=10 * i, won="".join(rng.choices("01", k=40)),
                                    invalid_rate=0.1, mean_steps=7.0) for i, label in enumerate(evidence.LABELS)]
                column = lambda low, high: [rng.uniform(low, high) for _ in range(6)]
                rows = dict(phase=[0, 0, 1, 1, 2, 2], env_steps=[10, 20, 30, 40, 50, 60], train_tokens=[*range(6)], seconds=[*range(6)],
                            success_plain=[None, *column(0, 1)[1:]], detour=column(0, 1), **{f"skills_{s}": column(0, 9) for s in evidence.STATES})
                bank = [dict(text="when a -> b", state="active", born=2, n=2, utility=0.2, effects=[[2, 0.5], [4, -0.5]])]
                cells[f"{world}/{variant}/{seed}"] = dict(weight_0=0.1 + 0.2 * seed, evaluations=evaluations, rows=rows, bank=bank, peak_gib=1.0,
                                                           evaluation_s=9.0, plan="--x", covered="01" * 20)
    return dict(preset="tiny", settings={}, code="c", commit="abc", begun="2026-01-31", device="a processor", versions=dict(torch="2"), cells=cells)


def test_a_study_is_read_back_as_it_was_written_and_another_file_is_refused(tmp_path):
    data, path = made_up(), tmp_path / "study.json"
    path.write_text(evidence.text(data))
    assert evidence.read(path) == data
    for spoiled, says in ((path.read_text().replace('"won":"', '"won":"x', 1), "a 0 or 1 for each game"), ("{}", "preset is missing"),
                          (path.read_text()[:-9], "cannot be read as JSON")):
        path.write_text(spoiled)
        with pytest.raises(UserError, match=says):
            evidence.read(path)


def test_tables_say_what_the_games_say():
    data = made_up()
    told = evidence.Study(data)
    rate = lambda variant, seed: told.cell("alfworld", variant, seed)["evaluations"][-1]["won"].count("1") / 40
    assert told.differences("alfworld", "no_gate", "siri") == pytest.approx([rate("no_gate", s) - rate("siri", s) for s in (0, 1)])
    assert told.pairs("alfworld", 0) == [0.5]                           # the effect of phase 1, not that of phase 2
    table = evidence.seeds_table(told, "alfworld")
    split = [line.split(" | ")[-1].strip(" |") for line in evidence.covered_table(told, "alfworld").splitlines()[2:]]
    won = np.array([told.won("alfworld", "siri", seed) for seed in (0, 1)])
    assert [float(x) for x in split] == pytest.approx([won[:, 1::2].mean(), won[:, ::2].mean()], abs=6e-4)
    final = next(line for line in table.splitlines() if "final" in line)
    assert [float(x) for x in final.split(" | ")[1:3]] == pytest.approx([rate("siri", s) for s in (0, 1)], abs=6e-4)
    rows = evidence.variants_table(told, "webshop").splitlines()[2:]
    assert len(rows) == len(evidence.MEANING)
    del data["cells"]["webshop/no_gate/1"]                              # a study that goes on: one seed, and no interval
    row = next(line for line in evidence.variants_table(told, "webshop").splitlines() if "no_gate" in line)
    assert row.split(" | ")[1] == "1" and "[" not in row
    data["cells"]["webshop/ema/0"]["bank"][0] |= dict(text="when a -> c", effects=[[2, 0.25]])               # the oracle says no such thing
    truth = [row.split(" | ")[1:] for row in evidence.truth_table(told, "webshop").splitlines()[2:4]]
    assert truth == [["", "2 of 2", "", "+0.0 (4)", " |"], ["", "1 of 2", "", "+0.0 (2)", "+25.0 (1) |"]]
    data["cells"]["webshop/gigpo/0"]["evaluations"].pop(3)              # it never had a bank
    row = next(line for line in evidence.variants_table(told, "webshop").splitlines() if "`gigpo`" in line)
    assert row.split(" | ")[2] == ""
    assert all(" | 10 to 30% | 2 | " in row for row in evidence.puzzle_table(told).splitlines()[2:])
    for figure in evidence.FIGURES.values():
        figure(told).savefig(os.devnull, format="png")
    for block in evidence.BLOCKS.values():
        assert block(told) and block(evidence.Study(made_up(worlds=["alfworld"]))) is not None


def test_a_page_is_filled_between_its_marks_and_a_changed_figure_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("# A\n<!-- study: claims -->\nold\n<!-- end -->\ntext\n")
    (tmp_path / "study.json").write_text(evidence.text(made_up()))
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "FILE", tmp_path / "study.json")
    monkeypatch.setattr(evidence, "PAGES", ("page.md",))
    monkeypatch.setattr(evidence, "FIGURES", {"bank.png": evidence.bank_figure})
    assert evidence.command(write=True) == 0 == evidence.command(write=False)
    (tmp_path / "study.json").write_text(evidence.text(made_up(worlds=["alfworld"])))
    assert evidence.command(write=False) == 1 and "bank.png was drawn from another file" in capsys.readouterr().out
    assert evidence.command(write=True) == 0 == evidence.command(write=False)
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# A\n") and page.endswith("<!-- end -->\ntext\n") and "warm-up lifts" in page and "\nold\n" not in page
    (tmp_path / "page.md").write_text(page.replace("warm-up lifts", "warm-up lowers"))
    assert evidence.command(write=False) == 1 and "-| warm-up lowers" in capsys.readouterr().out
    (tmp_path / "page.md").write_text("<!-- study: nothing -->\n<!-- end -->")
    with pytest.raises(UserError, match="must be one of short, household"):
        evidence.command(write=True)


def test_what_the_pages_show_is_what_was_measured():
    """Every table, the last lines of README's first command, and of which file each figure was drawn; by the program, which says so."""
    done = subprocess.run([sys.executable, str(HERE / "tools/study.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0 and "figures compared, 0 of them differ" in done.stdout, done.stdout + done.stderr
    assert "<!-- study: first run -->" in (HERE / "README.md").read_text()
