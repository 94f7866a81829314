"""Several processes as one run. Without torchrun this file is a test file; under it, the program that the tests give to each rank."""

import ast
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import siri
from conftest import HERE, SMALL, SMOKE, TIMES, config, metrics, slow, some_rows
from decode import Answer
from policy import Policy
from test_run import same_run
from tools.files import checkpoints, damage
from tools.ranks import Ranks, Torchrun, join
from tools.settings import make_environment

FAULTS = {      # what happens in the second step of a game on rank 1
    "machine": "raise envs.MachineFault('no room for games')",
    "program": "raise ZeroDivisionError('a fault of ours')",
    "hang": "time.sleep(10**6)"}
FAULTY = """
import os, sys, time
sys.path.insert(0, {home!r})
import envs, run, siri
done, fit_prompt = [], siri.fit_prompt
def faulty(policy, e, skill):
    if os.environ["RANK"] == "1" and e.steps:
        {fault}
    return fit_prompt(policy, e, skill)
siri.fit_prompt = faulty
if __name__ == "__main__":
    sys.exit(run.main(sys.argv[1:]))
"""


def torchrun(cwd, ranks, *args, program=HERE / "siri.py", options=()):
    """Ranks of the program in a folder, on a port of their own; output and errors go to out.txt and err.txt there."""
    with (cwd / "out.txt").open("a") as out, (cwd / "err.txt").open("a") as err:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                                 *options, str(program), *map(str, args)], cwd=cwd, stdout=out, stderr=err,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def process_of(rank, agent):
    """The process of a rank, found among the children of torchrun; None while there is none."""
    for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        try:
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
        except OSError:                             # it has just ended
            continue


def wait_until(happened, agent, limit=120):
    started = time.monotonic()
    while not happened():
        assert agent.poll() is None and time.monotonic() - started < limit
        time.sleep(0.05)


def said(cwd):
    """The program's own lines on standard error: not torchrun's, and not the bar."""
    return [line[line.index("siri: "):] for line in re.split("[\r\n]", (cwd / "err.txt").read_text()) if "siri: " in line]


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")


# ---- What is dealt -----------------------------------------------------------------------------------------------------

def of(size):
    ranks = Ranks()
    ranks.size = size
    return ranks


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 8))
def test_all_is_dealt_once_and_no_rank_idles(costs, size):
    dealt = of(size).deal(costs)
    assert len(dealt) == size and sorted(i for own in dealt for i in own) == list(range(len(costs)))
    loads = [sum(costs[i] for i in own) for own in dealt]
    assert max(loads) <= sum(costs) / size + max(costs, default=0)
    assert all(own for own in dealt[:len(costs)]) and not any(dealt[len(costs):])


def test_what_is_left_over_goes_to_the_early_ranks_and_long_games_are_spread():
    assert [len(own) for own in of(3).deal([1] * 8)] == [3, 3, 2]
    assert of(2).deal([50, 10, 10, 10, 10, 10]) == [[0], [1, 2, 3, 4, 5]]


def test_an_episode_is_told_without_loss():
    """As JSON: with text that is no character, probabilities to the last bit, and a step without a skill."""
    step = siri.Step([1, 2], Answer([5, 6], [-0.1, -1e-9 / 3]), "\ud800<action>", "look", "a\0b", "anchor", None, "then", 0.1, False)
    e, other = (siri.Episode(None, None, steps) for steps in ([step], []))
    e.success, e.score, e.overlong = True, 1 / 3, "too long"
    other.hear(*json.loads(json.dumps(e.told())))
    assert other == e and other.steps[0].response.logp == step.response.logp


def test_without_torchrun_there_is_one_rank_and_nothing_of_torch_distributed(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert type(join()) is Ranks
    tree = ast.parse((HERE / "tools/ranks.py").read_text())
    torchrun_class = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Torchrun")
    tree.body.remove(torchrun_class)
    assert "distributed" not in ast.unparse([node for node in tree.body if not isinstance(node, ast.Expr)])
    for name in ("siri", "policy", "run", "decode", "envs", "skills", "gigpo", "distill"):
        assert "torch.distributed" not in (HERE / f"{name}.py").read_text()


def test_gradients_and_sums_of_ranks_are_added_and_the_lowest_budget_holds(policy, monkeypatch):
    class Two(Ranks):
        size = 2

        def gather(self, data):
            return json.loads(json.dumps([data, [dict(pg_loss=-2.0, tokens=3), [False, True, True, *data[1][3:]], 100, 7]]))

        def add(self, tensors):
            added.extend(tensors)

    added, mine = [], policy.trainable
    monkeypatch.setattr(policy, "ranks", Two())
    for name, budget in (("gen_tokens", 50), ("update_tokens", 60)):
        monkeypatch.setattr(policy, name, budget)
    for p in mine:
        p.grad = None
    mine[2].grad = torch.ones_like(mine[2])
    sums = policy.add_up(Counter(pg_loss=0.5, tokens=4))
    assert sums == dict(pg_loss=-1.5, tokens=7) and (policy.gen_tokens, policy.update_tokens) == (50, 7)
    # A weight that no row of any rank went through has no gradient: zeros would move it by the optimizer's momentum.
    assert [p.grad is not None for p in mine[:4]] == [False, True, True, False] and len(added) == 2
    assert not added[0].any() and added[1].all()
    policy.rest()


# ---- Under torchrun ------------------------------------------------------------------------------------------------------

def work(ranks, folder):
    """On each rank: gradients of fixed updates, and a small run with SGD; what came of them is written to the folder."""
    torch.set_num_threads(1)
    policy, found = Policy(config(), ranks=ranks), {}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    rows = some_rows(policy)
    long = dataclasses.replace(rows[1], prompt=policy.encode("look " * 100), response=rows[2].response * 3)
    for name, batch in dict(ragged=rows, one=rows[:1], uneven=[*rows, long, *rows]).items():
        grads = []
        step = lambda optimizer: grads.append(torch.cat([p.grad.flatten() for p in policy.trainable]))
        optimizer = torch.optim.SGD(policy.trainable, lr=0.0)
        optimizer.register_step_pre_hook(lambda optimizer, *_: step(optimizer))
        cfg = dataclasses.replace(policy.cfg, minibatch=99, kl_beta=0.1, grad_clip=1e9)
        stats = siri.update(policy, optimizer, batch, [], 0.0, cfg, np.random.default_rng(0))
        found[name] = grads[0]
        found[f"{name} stats"] = torch.tensor([stats[k] for k in ("pg_loss", "kl", "entropy", "rows", "row_tokens")], dtype=torch.float64)
    cfg = dataclasses.replace(config(), warmup_max=1, mining_max=1, distill_max=1, panel=2, groups=3, group_size=2)
    policy = Policy(cfg, ranks=ranks)
    learner = siri.Learner.begin(cfg, make_environment(cfg), policy)
    learner.optimizer = torch.optim.SGD(policy.trainable, lr=0.5)
    played = [event for event in siri.train(learner) if isinstance(event, siri.Iteration)]
    found["sgd"] = torch.cat([p.detach().flatten() for p in policy.trainable])
    if ranks.rank == 0:
        torch.save(found, folder / f"{ranks.size}.pt")
        (folder / f"{ranks.size}.json").write_text(json.dumps([[s.response for group in it.groups for e in group for s in e.steps]
                                                               for it in played]))


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=slow)])
def test_gradients_and_a_run_with_sgd_are_those_of_one_process(tmp_path, ranks):
    agent = torchrun(tmp_path, ranks, tmp_path, program=__file__)
    work(Ranks(), tmp_path)
    assert agent.wait() == 0, (tmp_path / "err.txt").read_text()
    alone, shared = (torch.load(tmp_path / f"{n}.pt") for n in (1, ranks))
    for name in ("ragged", "one", "uneven"):
        assert (alone[name] - shared[name]).norm() < 1e-6 * alone[name].norm() > 0, name
        torch.testing.assert_close(alone[f"{name} stats"], shared[f"{name} stats"], rtol=1e-5, atol=1e-7)
    assert alone["sgd"].norm() > 0 and (alone["sgd"] - shared["sgd"]).abs().max() < 1e-5
    tokens = [json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, ranks)]
    assert len(tokens[0]) == 3 and tokens[0] == tokens[1]


def first_row(cwd):
    """But for times, and for the gap between sampler and update, which is nothing but rounding."""
    row = metrics(cwd)[0]
    assert float(row.pop("sampler_gap")) < 1e-6
    return {k: v for k, v in row.items() if k not in TIMES}


@linux
def test_two_ranks_play_what_one_plays_and_go_on_when_one_is_killed(runs, tmp_path):
    agent = torchrun(tmp_path, 2, *SMOKE, "--resume", "auto", options=("--max-restarts", "2"))
    wait_until(lambda: len(metrics(tmp_path)) >= 2, agent)
    os.kill(process_of(1, agent), signal.SIGKILL)
    assert agent.wait(90) == 0, (tmp_path / "err.txt").read_text()
    assert len(said(tmp_path)) == 1 and re.search(r"rank 1 .* no sign of life .*--resume runs/x", said(tmp_path)[0])
    assert first_row(tmp_path) == first_row(runs[0]) and len(metrics(tmp_path)) == len(metrics(runs[0]))
    assert (tmp_path / "out.txt").read_text().count("results of runs/x") == 1


@slow
@pytest.mark.parametrize("world", ["alfworld", "webshop"])
def test_one_two_and_three_ranks_play_the_same_and_resume_each_other(tmp_path, world):
    args = f"{SMALL} --env {world}".split()
    for n in (1, 2, 3):
        cwd = tmp_path / str(n)
        cwd.mkdir()
        assert torchrun(cwd, n, *args).wait() == 0, (cwd / "err.txt").read_text()
    assert first_row(tmp_path / "1") == first_row(tmp_path / "2") == first_row(tmp_path / "3")
    cwd = tmp_path / "mixed"
    cwd.mkdir()
    for n in (1, 2, 3, 1, 2, 3):                    # each plays a little, and is asked to stop
        agent, before = torchrun(cwd, n, *args, "--resume", "auto"), len(metrics(cwd))
        wait_until(lambda: len(metrics(cwd)) > before or agent.poll() is not None, agent)
        if agent.poll() is None:
            os.kill(process_of(n - 1, agent), signal.SIGTERM)
        assert agent.wait(90) == 0
    assert torchrun(cwd, 2, *args, "--resume", "auto").wait() == 0
    assert [row["solved_tasks"] for row in metrics(cwd)] == [row["solved_tasks"] for row in metrics(tmp_path / "1")]


@slow
@linux
def test_ten_kills_of_either_rank_change_nothing(tmp_path):
    whole, broken, dice = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    for cwd in (whole, broken):
        cwd.mkdir()
    assert torchrun(whole, 2, *SMOKE).wait() == 0
    agent, kills = torchrun(broken, 2, *SMOKE, "--resume", "auto", options=("--max-restarts", "99")), 0
    while agent.poll() is None and kills < 10:
        time.sleep(dice.uniform(2, 8))
        if (pid := process_of(dice.randrange(2), agent)) and agent.poll() is None:
            os.kill(pid, signal.SIGKILL)
            kills += 1
    assert agent.wait(180) == 0 and kills == 10
    same_run(whole / "runs/x", broken / "runs/x")


@slow
@linux
def test_a_signal_to_any_rank_saves_and_ends_all(tmp_path):
    agent = torchrun(tmp_path, 2, *f"{SMALL} --groups 2 --group-size 2 --warmup-max 50 --n-req 999 --panel 1".split(),
                     options=("--max-restarts", "3"))
    wait_until(lambda: len(metrics(tmp_path)) >= 1, agent)
    os.kill(process_of(1, agent), signal.SIGTERM)
    assert agent.wait(60) == 0                      # or torchrun would begin again
    done = len(metrics(tmp_path))
    assert said(tmp_path)[-1] == f"siri: stopped before iteration {done}; go on with: torchrun ... siri.py --resume runs/x"
    newest = checkpoints(tmp_path / "runs/x")[0]
    assert newest.name == f"{done:05d}-0" and not damage(newest)


@pytest.mark.parametrize("fault, line", [
    ("machine", r"rank 1 \(process \d+ on .*\): no room for games; then go on with --resume runs/x"),
    pytest.param("program", r"rank 1 .*: ZeroDivisionError: a fault of ours", marks=slow),
    pytest.param("hang", r"rank 1 .* has given no sign of life for 20 s.*go on with: torchrun ... siri.py --resume runs/x", marks=slow)])
def test_a_fault_of_one_rank_ends_all_with_one_line(tmp_path, fault, line):
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY.format(home=str(HERE), fault=FAULTS[fault]))
    started = time.monotonic()
    assert torchrun(tmp_path, 2, *SMALL.split(), program=program).wait(90) == 1
    assert time.monotonic() - started < 90 and len(said(tmp_path)) == 1 and re.search(line, said(tmp_path)[0])
    assert ("Traceback" in (tmp_path / "err.txt").read_text().partition("torch/distributed")[0]) == (fault == "program")


@slow
@linux
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_ends_the_run_within_a_minute(tmp_path, rank):
    agent = torchrun(tmp_path, 2, *SMOKE)
    wait_until(lambda: len(metrics(tmp_path)) >= 1, agent)
    started = time.monotonic()
    os.kill(process_of(rank, agent), signal.SIGSTOP)
    assert agent.wait(90) == 1 and time.monotonic() - started < 60
    assert len(said(tmp_path)) == 1 and re.search(rf"rank {rank} .* no sign of life for 20 s", said(tmp_path)[0])


@slow
@pytest.mark.parametrize("args, line", [(["--play"], "--play: is for one process"), (["--preset", "smok"], "--preset smok")])
def test_bad_flags_and_commands_for_one_process_are_refused_once(tmp_path, args, line):
    assert torchrun(tmp_path, 2, *args).wait(60) == 1
    assert len(said(tmp_path)) == 1 and line in said(tmp_path)[0]


if __name__ == "__main__":
    ranks = join()
    assert isinstance(ranks, Torchrun)
    work(ranks, Path(sys.argv[1]))
    ranks.end("", lambda: None)
