"""What the design buys, measured beside what people would use instead.

    python siri.py --bench                       every part that this machine can run; writes bench.json
    python siri.py --bench rollouts,logprobs     some of them

Both sides of a comparison take turns in one process (A B A B ...), after a warm-up round that is thrown away. A row holds
the median, least and greatest of each side over the rounds, the ratio ours / other of the medians, and the range of the
ratios of single rounds. Peak memory is measured with each side in a fresh process of its own, above what the process
held just before. Policy, games and prompts are the tiny preset's, but for `paper`.

Parts: `rollouts` and `scaling` (generation), `ranks` (two processes beside one), `updates` and `logprobs` (training),
`environment` (beside stock TextWorld), `trl` (a whole iteration beside TRL's GRPOTrainer; skipped without TRL), `paper` (the
paper preset's policy; skipped without a CUDA device). A part is a function of the configuration, the number of rounds, and
whether to shrink everything for a test; it returns its rows.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import envs
import gigpo
import siri
from policy import TAGS, Policy, UserError, make_optimizer, peak_gib, reset_resident_peak, resident_peak
from tools.files import write_json
from tools.oracle import oracle_walkthrough
from tools.settings import make_environment, resolve

ROOT = Path(__file__).resolve().parent.parent
TRL = "trl==1.16.0"                                     # the release whose source the `trl` part was written against
Row = dict[str, Any]
PARTS: dict[str, Callable[[siri.Config, int, bool], list[Row]]] = {}


def add_part(function: Callable[[siri.Config, int, bool], list[Row]]) -> Callable:
    """Register a part in PARTS under its own name."""
    PARTS[function.__name__] = function
    return function


# ---- 1. Measuring --------------------------------------------------------------------------------------------


def alternate(rounds: int, **sides: Callable[[int], dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Call every side in turn, `rounds` times after one warm-up. A side takes the round's number (0 is the warm-up) and
    returns its measures; the result holds the values of each side and measure over the rounds."""
    values: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in sides}
    for k in range(rounds + 1):
        for name, side in sides.items():
            for measure, value in side(k).items():
                if k > 0:
                    values[name][measure].append(value)
    return values


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, greatest and all of a side's values over the rounds."""
    return dict(median=median(values), min=min(values), max=max(values), values=list(values))


def row(part: str, what: str, unit: str, ours: Sequence[float], than: str | None = None,
        other: Sequence[float] | None = None, require: str | None = None, **more: Any) -> Row:
    """One line of the table. `require`, such as ">= 5", is about the ratio ours / other, or about ours if it is alone.
    `ours` and `other` hold one value, in `unit`, for each round."""
    out = dict(part=part, what=what, unit=unit, ours=spread(ours), than=than, other=None, ratio=None, require=require,
               met=None, **more)
    if other is not None:
        each = [a / b for a, b in zip(ours, other)]
        out |= dict(other=spread(other), ratio=dict(median=median(ours) / median(other), min=min(each), max=max(each)))
    if require:
        sign, bound = require.split()
        value = (out["ratio"] or out["ours"])["median"]
        out["met"] = bool(value >= float(bound) if sign == ">=" else value <= float(bound))
    return out


def skipped(part: str, reason: str) -> list[Row]:
    """The one row of a part that can't run here, with the reason."""
    return [dict(part=part, skipped=reason)]


def wait_for_device() -> None:
    """A CUDA device works behind the program's back; a time is taken when it has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of some work, the device's included, and its result."""
    wait_for_device()
    started = time.perf_counter()
    result = work()
    wait_for_device()
    return time.perf_counter() - started, result


class Peak:
    """`with Peak(device) as peak: ...` measures how far memory rose above its level at the start: `peak.mib`. Tensors on
    a CUDA device; on a CPU the resident set, whose mark Linux can reset and other systems can't (there the process must
    not have held more before)."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")

    def __enter__(self) -> Peak:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            if sys.platform == "linux":
                with contextlib.suppress(AttributeError):                       # not in every C library
                    ctypes.CDLL(None).malloc_trim(0)                            # freed memory goes back to the system
            reset_resident_peak()
            self.before = resident_peak()
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = ((torch.cuda.max_memory_allocated() if self.cuda else resident_peak()) - self.before) / 2**20


def in_child(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function of this module in a fresh process, with the same number of threads. JSON in and out. RuntimeError
    with the end of its errors if it fails."""
    call = dict(function=function.__name__, threads=torch.get_num_threads(), arguments=arguments)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run([sys.executable, "-c", "from tools import bench; bench.child()"], input=json.dumps(call),
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    if done.returncode:
        raise RuntimeError(f"{call['function']} ended with code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    """The other end of `in_child`: the call from standard input, its result as the last line of output."""
    call = json.load(sys.stdin)
    torch.set_num_threads(call["threads"])
    print("\n" + json.dumps(globals()[call["function"]](**call["arguments"])))


# ---- 2. What all parts work on -------------------------------------------------------------------------------


def tiny(cfg: siri.Config) -> siri.Config:
    """The configuration of the CPU parts: the user's own if it is a compact world on ALFWorld, else the tiny preset's."""
    if cfg.compact and cfg.env == "alfworld":
        return cfg
    return resolve(dict(preset="tiny", seed=cfg.seed))[0]


def some_tasks(env: envs.Environment, turn: int, n: int) -> list[envs.Task]:
    """The training games of one round: the same for both sides of it, others in every round."""
    tasks = env.tasks("train")
    return [tasks[(turn * n + i) % len(tasks)] for i in range(n)]


def play(policy: Any, env: Any, tasks: Sequence[envs.Task], size: int, cfg: siri.Config, dice: int = 0) -> list[siri.Group]:
    """Groups of `size` plain rollouts, with the same dice on all sides. RuntimeError if one fails."""
    failures: list[str] = []
    groups = siri.rollout(policy, env, [(task, [None] * size) for task in tasks], cfg.temperature, failures, dice)
    if failures:
        raise RuntimeError(f"environment failed: {failures[0]}")
    return groups


def steps_of(groups: Sequence[siri.Group]) -> list[siri.Step]:
    """All steps of all rollouts, in order."""
    return [s for group in groups for e in group for s in e.steps]


def rows_of(groups: Sequence[siri.Group], cfg: siri.Config, env: Any) -> list[siri.Row]:
    """The training rows of rollouts, with their advantages (G1-G6)."""
    for group in groups:
        siri.assign_advantages(group, cfg, env)
    return siri.rl_rows(groups)


def adamw(policy: Policy, lr: float) -> torch.optim.Optimizer:
    """torch's AdamW over the adapter, the same for both sides."""
    return torch.optim.AdamW(policy.trainable, lr=lr, betas=(0.9, 0.999), weight_decay=policy.cfg.weight_decay)


# ---- 3. Rollouts ---------------------------------------------------------------------------------------------


def in_lock_step(policy: Policy) -> Policy:
    """The same policy, answered by `generate` in batches in which all wait for the longest answer."""
    other = copy.copy(policy)
    other.lock_step = "the benchmark"
    return other


def one_by_one(policy: Policy) -> Policy:
    """The same policy, with every prompt of every episode generated alone."""
    other = in_lock_step(policy)
    other.sample = lambda asks, temperature, max_new: [policy.sample([ask], temperature, max_new)[0] for ask in asks]
    return other


def timed(env: envs.Environment, spent: Counter) -> SimpleNamespace:
    """The environment, with the seconds of its calls added up in `spent["seconds"]`."""
    def clock(call: Callable) -> Callable:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args)
            finally:
                spent["seconds"] += time.perf_counter() - started
        return run

    def open_game(task: envs.Task) -> SimpleNamespace:
        game = clock(env.open)(task)
        return SimpleNamespace(start=game.start, step=clock(game.step), close=clock(game.close))

    return SimpleNamespace(open=open_game, tasks=env.tasks, max_steps=env.max_steps)


@add_part
def rollouts(cfg: siri.Config, rounds: int, quick: bool) -> list[Row]:
    """8 groups of 8 episodes by `siri.rollout`; the same episodes with answers by `generate`, in lock step and one at a time. Live
    rows are those of the decoder's batches whose token was wanted."""
    cfg = tiny(cfg)
    n_groups, size = (2, 2) if quick else (8, 8)
    env, policy, spent = make_environment(cfg), Policy(cfg), Counter()
    watched = timed(env, spent)

    def side(policy: Policy) -> Callable[[int], dict[str, float]]:
        def run(k: int) -> dict[str, float]:
            spent.clear()
            policy.work.clear()
            took, groups = seconds(lambda: play(policy, watched, some_tasks(env, k, n_groups), size, cfg, k))
            steps = steps_of(groups)
            return dict(rate=sum(len(s.response) for s in steps) / took, environment=100 * spent["seconds"] / took,
                        steps=len(steps), tokens=sum(len(s.response) for s in steps),
                        live=100 * policy.work["live"] / max(policy.work["rows"], 1))
        return run

    found = alternate(rounds, ours=side(policy), lock_step=side(in_lock_step(policy)), one_by_one=side(one_by_one(policy)))
    ours = found["ours"]
    work = lambda other: {name: {k: side[k] for k in ("steps", "tokens")}
                          for name, side in (("ours", ours), ("other", found[other]))}
    return [row("rollouts", "rollout against one prompt at a time", "new tokens/s", ours["rate"], "one by one",
                found["one_by_one"]["rate"], ">= 5", work=work("one_by_one")),
            row("rollouts", "rollout against generate in lock step", "new tokens/s", ours["rate"], "lock step",
                found["lock_step"]["rate"], work=work("lock_step")),
            row("rollouts", "live rows of the decoder's batches", "%", ours["live"], require=">= 80"),
            row("rollouts", "share of the environment in our rollout", "%", ours["environment"], require="<= 11")]


@add_part
def scaling(cfg: siri.Config, rounds: int, quick: bool) -> list[Row]:
    """Seconds per episode with 16 to 128 episodes at once, in groups of 8, beside 16 at once."""
    cfg = tiny(cfg)
    size, counts = (2, (2, 4)) if quick else (8, (16, 32, 64, 128))
    env, policy = make_environment(cfg), Policy(cfg)

    def side(n: int) -> Callable[[int], dict[str, float]]:
        def run(k: int) -> dict[str, float]:
            tasks = some_tasks(env, k, max(counts) // size)[:n // size]
            other = copy.copy(policy)
            other.cfg = dataclasses.replace(cfg, groups=n // size)              # so many at once
            took, groups = seconds(lambda: play(other, env, tasks, size, cfg, k))
            return dict(cost=took / n, steps=len(steps_of(groups)))
        return run

    found = alternate(rounds, **{str(n): side(n) for n in counts})
    first = found[str(counts[0])]["cost"]
    return [row("scaling", f"{n} episodes at once", "s/episode", found[str(n)]["cost"],
                f"{counts[0]} at once" if n > counts[0] else None, first if n > counts[0] else None,
                work=dict(steps=found[str(n)]["steps"])) for n in counts]


@add_part
def ranks(cfg: siri.Config, rounds: int, quick: bool) -> list[Row]:
    """A training iteration on two ranks beside one process, with one thread each: the same games and the same tokens."""
    if (os.cpu_count() or 1) < 2:
        return skipped("ranks", "fewer than two processor cores")
    n = 2 if quick else 4
    args = ["--preset", "smoke" if quick else "tiny", "--variant", "gigpo", "--warmup-max", str(n), "--mining-max", "0",
            "--distill-max", "0", "--panel", "1", "--name", "x"]

    def side(*launcher: str) -> Callable[[int], dict[str, float]]:
        def run(k: int) -> dict[str, float]:
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run([sys.executable, *launcher, str(ROOT / "siri.py"), *args, "--seed", str(cfg.seed + k)],
                                      cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                if done.returncode:
                    raise RuntimeError(f"{launcher or 'one process'}: {done.stderr[-2000:]}")
                with (Path(folder) / "runs/x/metrics.csv").open(newline="") as f:
                    rows = [*csv.DictReader(f)][1:]                     # the first iteration warms up
            mean = lambda name: sum(float(r[name]) for r in rows) / len(rows)
            return dict(rollout=mean("rollout_s"), update=mean("update_s"), steps=mean("mean_steps"),
                        whole=mean("rollout_s") + mean("update_s"))
        return run

    found = alternate(rounds, two=side("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), one=side())
    two, one = found["two"], found["one"]
    work = dict(ours=dict(steps=two["steps"]), other=dict(steps=one["steps"]))
    return [row("ranks", f"{what} on two ranks", "s", two[name], "one process", one[name], require, work=work)
            for what, name, require in (("iteration", "whole", "<= 0.65"), ("its rollouts", "rollout", None),
                                        ("its update", "update", None))]


# ---- 4. Environment ------------------------------------------------------------------------------------------


@functools.cache
def stock_textworld() -> Any:
    """ALFWorld's own stack: TextWorld's PddlEnv under the wrapper that names things. One for the whole process, because
    closing several Fast Downward handles can crash Python when it ends."""
    import textworld
    from alfworld.agents.utils.misc import Demangler
    from textworld.envs.pddl import PddlEnv

    class Named(textworld.core.Wrapper):            # as in alfworld's alfred_tw_env, whose import needs much more
        def load(self, *args: Any, **kwargs: Any) -> None:
            super().load(*args, **kwargs)
            demangler = Demangler(game_infos=self._entity_infos, shuffle=False)
            for info in self._entity_infos.values():
                info.name = demangler.demangle_alfred_name(info.id)

    return Named(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))


@add_part
def environment(cfg: siri.Config, rounds: int, quick: bool) -> list[Row]:
    """A generated game on an official floor plan, another one in every round, played by our engine and by stock
    TextWorld: loading it up to its first text (stock: load and reset), then the same random admissible commands. The
    share of steps after which both showed the same text and the same admissible commands must be all."""
    world, stock = envs.AlfWorld.generated(cfg.seed, max_steps=1000), stock_textworld()
    tasks, length = world.tasks("valid_seen"), 5 if quick else 40
    walk: list[str] = []
    shown: dict[str, list] = {}

    def ours(k: int) -> dict[str, float]:
        task, rng = tasks[k], random.Random(k)
        loading, game = seconds(lambda: world.open(task))
        walk.clear()
        state, shown["ours"], stepping = game.start, [], 0.0
        while len(walk) < length and not state.done:
            walk.append(rng.choice(state.admissible))
            took, state = seconds(lambda: game.step(state, walk[-1]))
            stepping += took
            shown["ours"].append((state.observation, list(state.admissible)))
        game.close()
        return dict(load=1 / loading, step=len(walk) / stepping)

    def theirs(k: int) -> dict[str, float]:
        data = envs.pddl_game(tasks[k].data)
        data = {**data, "walkthrough": oracle_walkthrough(data)}
        loading, _ = seconds(lambda: (stock.load(data), stock.reset()))
        shown["theirs"], stepping = [], 0.0
        for command in walk:
            took, (state, _, _) = seconds(lambda: stock.step(command))
            stepping += took
            shown["theirs"].append((state.feedback, state["admissible_commands"]))
        same = sum(a == b for a, b in zip(shown["ours"], shown["theirs"])) / len(walk)
        return dict(load=1 / loading, step=len(walk) / stepping, same=100 * same)

    found = alternate(rounds, ours=ours, stock=theirs)
    compare = lambda what, unit, measure: row("environment", what, unit, found["ours"][measure], "stock TextWorld",
                                              found["stock"][measure])
    return [compare("load a game and reset", "1/s", "load"), compare("step", "steps/s", "step"),
            row("environment", "steps with the same text and commands", "%", found["stock"]["same"], require=">= 100")]


# ---- 5. Updates ----------------------------------------------------------------------------------------------


def textbook_update(policy: Policy, optimizer: torch.optim.Optimizer, rows: Sequence[siri.Row], cfg: siri.Config,
                    batch: int = 8) -> dict[str, float]:
    """The optimizer step of `siri.update` as it is commonly written: batches of so many rows in the order given, padded
    to `max_prompt + max_response`, every row, fp32 logits of the whole vocabulary at all positions. Returns the
    gradient norm before clipping."""
    model, width = policy.model, cfg.max_prompt + cfg.max_response
    n = sum(len(r.response) for r in rows)

    def logprobs(part: Sequence[siri.Row]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [r.prompt + r.response for r in part]
        ids = torch.tensor([t + [policy.pad] * (width - len(t)) for t in texts], device=policy.device)         # (B, T)
        mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts], device=policy.device)      # (B, T)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float() / cfg.temperature   # (B, T, V)
        logp = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)                         # (B, T-1)
        at = torch.arange(1, width, device=policy.device)
        first, last = (torch.tensor(x, device=policy.device)[:, None] for x in zip(
            *[(len(r.prompt), len(r.prompt) + len(r.response)) for r in part]))
        return logp, (at >= first) & (at < last)                                                  # response tokens

    parts = [rows[i:i + batch] for i in range(0, len(rows), batch)]
    with torch.no_grad(), model.disable_adapter():
        reference = [logprobs(p)[0] for p in parts]
    model.train()
    for p, ref in zip(parts, reference):
        logp, mask = logprobs(p)
        advantage = torch.tensor([r.advantage for r in p], device=policy.device)[:, None].expand_as(logp)
        loss = gigpo.clipped_surrogate(logp, logp.detach(), advantage, clip=cfg.clip, dual_clip=cfg.dual_clip or None)
        (((loss + cfg.kl_beta * gigpo.kl_k3(logp, ref)) * mask).sum() / n).backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.trainable, cfg.grad_clip).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return dict(grad_norm=norm)


def one_update(side: str, policy: Policy, rows: list[siri.Row], cfg: siri.Config) -> dict[str, float]:
    """One optimizer step over all rows. Its learning rate is zero, so that all rounds do the same."""
    optimizer = adamw(policy, lr=0.0)
    if side == "ours":
        return siri.update(policy, optimizer, rows, [], 0.0, cfg, np.random.default_rng(0))
    return textbook_update(policy, optimizer, rows, cfg)


def memory_of_update(side: str, config: dict[str, Any], rows: str) -> float:
    """In a process of its own: the peak of one update, in MiB."""
    cfg = siri.Config(**config)
    policy, rows = Policy(cfg), [siri.Row(**r) for r in json.loads(Path(rows).read_text())]
    one_update(side, policy, rows[:1], cfg)                                     # what is loaded on first use
    with Peak(policy.device) as peak:
        one_update(side, policy, rows, cfg)
    return peak.mib


@add_part
def updates(cfg: siri.Config, rounds: int, quick: bool) -> list[Row]:
    """`siri.update` on the rows of 8 groups of 8 rollouts, and the textbook form on the same rows. Ours does not run rows
    without an advantage; their tokens count as trained on both sides, because both divide by them."""
    cfg = dataclasses.replace(tiny(cfg), minibatch=10**6)                      # one optimizer step, as in the textbook
    n_groups, size = (2, 2) if quick else (8, 8)
    policy, env = Policy(cfg), make_environment(cfg)
    torch.manual_seed(cfg.seed)
    rows = rows_of(play(policy, env, some_tasks(env, 0, n_groups), size, cfg), cfg, env)
    tokens = sum(len(r.response) for r in rows)

    def side(name: str) -> Callable[[int], dict[str, float]]:
        def run(k: int) -> dict[str, float]:
            took, stats = seconds(lambda: one_update(name, policy, rows, cfg))
            return dict(rate=tokens / took, grad_norm=stats["grad_norm"])
        return run

    found = alternate(rounds, ours=side("ours"), textbook=side("textbook"))
    ours, theirs = found["ours"], found["textbook"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        file.write_text(json.dumps([dict(prompt=r.prompt, response=r.response, advantage=r.advantage) for r in rows]))
        peak = {name: [in_child(memory_of_update, side=name, config=dataclasses.asdict(cfg), rows=str(file))]
                for name in ("ours", "textbook")}
    return [row("updates", f"update on {len(rows)} rows", "trained tokens/s", ours["rate"], "textbook", theirs["rate"],
                work=dict(rows=len(rows), run=sum(r.advantage != 0 for r in rows), tokens=tokens)),
            row("updates", "gradient norm of the update", "", ours["grad_norm"], "textbook", theirs["grad_norm"]),
            row("updates", "peak memory of the update", "MiB", peak["ours"], "textbook", peak["textbook"], "<= 1")]


@dataclasses.dataclass
class HeadProblem:
    """Hidden states, a frozen language-model head, targets, and a weight for each log-probability."""
    vocab: int
    width: int
    tokens: int

    def __post_init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        self.head = torch.nn.Linear(self.width, self.vocab, bias=False, device=self.device).requires_grad_(False)
        self.hidden = torch.randn(self.tokens, self.width, device=self.device, requires_grad=True)             # (N, H)
        self.targets = torch.randint(self.vocab, (self.tokens,), device=self.device)                           # (N,)
        self.weight = torch.randn(self.tokens, device=self.device)                                             # (N,)

    def gradient(self, side: str) -> torch.Tensor:
        """Forward and backward; the gradient with respect to the hidden states. The textbook form has no entropy."""
        if side == "ours":
            logp, _ = gigpo.token_logprobs(self.hidden, self.head, self.targets)
        else:
            logp = self.head(self.hidden).float().log_softmax(-1).gather(-1, self.targets[:, None]).squeeze(-1)
        return torch.autograd.grad((logp * self.weight).sum(), self.hidden)[0]


def memory_of_logprobs(side: str, size: list[int]) -> float:
    """In a process of its own: the peak of forward and backward, in MiB."""
    problem = HeadProblem(*size)
    with Peak(problem.device) as peak:
        problem.gradient(side)
    return peak.mib


@add_part
def logprobs(cfg: siri.Config, rounds: int, quick: bool) -> list[Row]:
    """`gigpo.token_logprobs` at the size of a real vocabulary, 152,064 ids and 4,096 response tokens, beside the
    log-softmax of all logits. Forward and backward; ours also computes the entropy. The textbook form takes 7 GiB."""
    size = [5000, 32, 700] if quick else [152_064, 896, 4096]
    problem, gradients = HeadProblem(*size), {}

    def side(name: str) -> Callable[[int], dict[str, float]]:
        def run(k: int) -> dict[str, float]:
            took, gradients[name] = seconds(lambda: problem.gradient(name))
            return dict(seconds=took)
        return run

    found = alternate(rounds, ours=side("ours"), textbook=side("textbook"))
    error = ((gradients["ours"] - gradients["textbook"]).norm() / gradients["textbook"].norm()).item()
    peak = {name: [in_child(memory_of_logprobs, side=name, size=size)] for name in ("ours", "textbook")}
    took = {name: found[name]["seconds"] for name in found}
    return [row("logprobs", "forward and backward", "s", took["ours"], "textbook", took["textbook"], "<= 1.15",
                size=dict(zip(("vocabulary", "width", "tokens"), size))),
            row("logprobs", "peak memory", "MiB", peak["ours"], "textbook", peak["textbook"], "<= 0.25"),
            row("logprobs", "gradient's distance from the textbook's", "of its norm", [error], require="<= 1e-5")]


# ---- 6. A whole iteration beside TRL -------------------------------------------------------------------------


def our_iteration(policy: Policy, optimizer: torch.optim.Optimizer, env: Any, tasks: Sequence[envs.Task],
                  cfg: siri.Config) -> Counter:
    """Rollouts, advantages (G1-G6), one optimizer step. Returns the work done: steps, and tokens read, sampled,
    trained and run (see `trl`)."""
    rows = rows_of(play(policy, env, tasks, cfg.group_size, cfg), cfg, env)
    stats = siri.update(policy, optimizer, rows, [], 0.0, cfg, np.random.default_rng(0))
    return Counter(steps=len(rows), read=sum(len(r.prompt) for r in rows), sampled=sum(len(r.response) for r in rows),
                   trained=sum(len(r.response) for r in rows if r.advantage), run=stats["row_tokens"])


def trl_rollout(policy: Policy, env: Any, tasks: dict[str, envs.Task], work: Counter) -> Callable:
    """A `rollout_func` of GRPOTrainer: it plays an episode for every prompt, which here is a task's id."""
    cfg = policy.cfg

    def turn(task: envs.Task, state: envs.State) -> list[int]:
        return policy.encode(envs.render_prompt(task.goal, state, [], style=cfg.prompt_style, window=0, world=cfg.env))

    def roll(prompts: list[str], trainer: Any) -> dict[str, Any]:
        games = {name: env.open(tasks[name]) for name in dict.fromkeys(prompts)}
        episodes = [SimpleNamespace(task=tasks[name], game=games[name], state=games[name].start, reward=0.0,
                                    prompt=turn(tasks[name], games[name].start), completion=[], sampled=[])
                    for name in prompts]
        live = episodes
        while live:
            transcripts = [e.prompt + e.completion for e in live]
            responses, _ = trainer._generate_single_turn(transcripts, None, {}, 1)
            work.update(steps=len(live), read=sum(map(len, transcripts)), sampled=sum(map(len, responses)))
            for e, ids in zip(live, responses):
                e.state = e.game.step(e.state, envs.parse_action(policy.decode(ids)) or "")
                e.reward += e.state.reward
                answer = [] if e.state.done else turn(e.task, e.state)
                e.completion += ids + answer
                e.sampled += [1] * len(ids) + [0] * len(answer)
            live = [e for e in live if not e.state.done]
        for game in games.values():
            game.close()
        work.update(trained=sum(sum(e.sampled) for e in episodes),
                    run=sum(len(e.prompt + e.completion) for e in episodes))
        return dict(prompt_ids=[e.prompt for e in episodes], completion_ids=[e.completion for e in episodes],
                    env_mask=[e.sampled for e in episodes], episode_return=[e.reward for e in episodes], logprobs=None)

    return roll


def trl_trainer(policy: Policy, env: Any, tasks: Sequence[envs.Task], work: Counter, folder: str, lr: float) -> Any:
    """GRPOTrainer with our settings: one optimizer step after each batch of `groups` x `group_size` episodes."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer
    cfg = policy.cfg

    def episode_reward(episode_return: list[float], **_: Any) -> list[float]:
        return episode_return

    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")         # TRL's to mend
    settings = GRPOConfig(
        output_dir=folder, max_steps=len(tasks) // cfg.groups, per_device_train_batch_size=cfg.group_size,
        gradient_accumulation_steps=cfg.groups, num_generations=cfg.group_size, max_completion_length=cfg.max_response,
        temperature=cfg.temperature, beta=cfg.kl_beta, epsilon=cfg.clip, learning_rate=lr, lr_scheduler_type="constant",
        weight_decay=cfg.weight_decay, max_grad_norm=cfg.grad_clip, use_cpu=policy.device == "cpu", bf16=False,
        gradient_checkpointing=False, shuffle_dataset=False, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, seed=cfg.seed)
    trainer = GRPOTrainer(
        model=policy.model, reward_funcs=episode_reward, args=settings, processing_class=policy.tokenizer,
        train_dataset=Dataset.from_list([dict(prompt=task.id) for task in tasks]), optimizers=(adamw(policy, lr), None),
        rollout_func=trl_rollout(policy, env, {task.id: task for task in tasks}, work))
    trainer.remove_callback(PrinterCallback)
    return trainer


TRL_LR = 1e-6                   # both sides: the policies, and with them the work of a round, stay as they are


def memory_of_iteration(side: str, config: dict[str, Any]) -> float:
    """In a process of its own, with everything loaded: the peak of two iterations, in MiB."""
    cfg = siri.Config(**config)
    env, policy = make_environment(cfg), Policy(cfg)
    tasks = some_tasks(env, 0, 2 * cfg.groups)
    play(policy, env, tasks[:1], 2, cfg)                            # what is loaded on first use
    if side == "ours":
        optimizer = adamw(policy, TRL_LR)
        with Peak(policy.device) as peak:
            for i in range(0, len(tasks), cfg.groups):
                our_iteration(policy, optimizer, env, tasks[i:i + cfg.groups], cfg)
        return peak.mib
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(policy, env, tasks, Counter(), folder, TRL_LR)
        with Peak(policy.device) as peak:
            trainer.train()
    return peak.mib


@add_part
def trl(cfg: siri.Config, rounds: int, quick: bool) -> list[Row]:
    """One iteration of ours beside one of TRL's GRPOTrainer: rollouts, advantages, one AdamW step with clipping and KL.

    The same on both sides: policy (assets/tiny, LoRA of the same rank), environment, games, 64 episodes in groups of
    8, at most `max_steps` steps of at most `max_response` tokens, stop tokens, temperature, KL coefficient, optimizer,
    precision (fp32), no gradient checkpointing, no logging or saving. Every iteration of TRL is followed by one of ours.

    TRL's trainer takes one sequence per episode. Its `rollout_func` is made for environments whose turns are not tool
    calls (`environment_factory` wants those, and ends an episode at the first response without one): it plays all
    unfinished episodes together, with the batched generation of TRL's own tool loop, which reads the whole sequence in
    every turn. The sequence is the transcript: first prompt, response, next prompt, response ... Each turn shows
    observation, admissible actions and task without the history, which stands before it anyway. All sampled tokens
    are trained, and marked for it (`env_mask`); advantages are GRPO's, one per episode. Micro-batches are of 8 episodes.

    Ours has a prompt for every step (the last two observations and the current one), trains steps as rows with GiGPO's
    advantages, and does not run those without one.

    The policy was made for single steps, so it may sample other responses in a transcript, and play more or fewer steps.
    Hence the rows: the required one is per sampled token, the others per environment step, per trained token and per
    iteration, each over the whole time of an iteration. `work` has the counts: steps, tokens read before sampling,
    sampled, trained, and run through forward and backward (padding not counted).
    """
    if importlib.util.find_spec("trl") is None:
        return skipped("trl", f"TRL is not installed: pip install {TRL}")
    n_groups, size = (2, 2) if quick else (8, 8)
    cfg = dataclasses.replace(tiny(cfg), groups=n_groups, group_size=size, minibatch=10**6)
    from transformers import TrainerCallback
    env, policy = make_environment(cfg), Policy(cfg)
    optimizer, work = adamw(policy, TRL_LR), Counter()
    tasks = some_tasks(env, 0, (rounds + 1) * n_groups)
    measured: dict[str, list[Counter]] = dict(ours=[], trl=[])

    class Turns(TrainerCallback):
        """Takes TRL's time from the end of our iteration to the end of its step, then runs ours."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait_for_device()
            measured["trl"].append(Counter(work, seconds=time.perf_counter() - self.started))
            work.clear()
            games = tasks[(state.global_step - 1) * n_groups:state.global_step * n_groups]
            took, ours = seconds(lambda: our_iteration(policy, optimizer, env, games, cfg))
            measured["ours"].append(Counter(ours, seconds=took))
            self.started = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(Policy(cfg), env, tasks, work, folder, TRL_LR)
        trainer.add_callback(Turns())
        trainer.train()
    measured = {name: found[1:] for name, found in measured.items()}                          # without the warm-up
    counts = {name: [dict(c) for c in found] for name, found in measured.items()}
    peak = {name: [in_child(memory_of_iteration, side=name, config=dataclasses.asdict(cfg))] for name in measured}

    def rate(what: str, unit: str, measure: str | None, **more: Any) -> Row:
        values = {name: [(c[measure] if measure else 60) / c["seconds"] for c in measured[name]] for name in measured}
        return row("trl", what, unit, values["ours"], "GRPOTrainer", values["trl"], **more)

    return [rate("whole iteration, per sampled token", "tokens/s", "sampled", require=">= 1.5", work=counts),
            rate("whole iteration, per environment step", "steps/s", "steps"),
            rate("whole iteration, per trained token", "tokens/s", "trained"),
            rate("whole iteration", "1/min", None),
            row("trl", "peak memory of two iterations", "MiB", peak["ours"], "GRPOTrainer", peak["trl"], "<= 1")]


# ---- 7. The paper preset's policy ----------------------------------------------------------------------------

QWEN_7B = dict(vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
               num_attention_heads=28, num_key_value_heads=4)
SMALL = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2)


def random_model(folder: Path, sizes: dict[str, int], device: str) -> None:
    """A Qwen2 model with random weights and a tokenizer of as many words, as `save_pretrained` leaves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(sizes["vocab_size"] - 100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(list(TAGS))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False, max_position_embeddings=32_768,
                                             eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="4GB")


def ceilings(device: str) -> tuple[float, float]:
    """What this device reaches: bytes/s of a large copy, read and written, and bf16 FLOP/s of a large product."""
    n = 2**30 if device == "cuda" else 2**24
    source, side = torch.ones(n, dtype=torch.uint8, device=device), 8192 if device == "cuda" else 256
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    copy_s, product_s = ([seconds(work)[0] for _ in range(6)][1:] for work in (source.clone, lambda: a @ a))
    return 2 * n / median(copy_s), 2 * side**3 / median(product_s)


@add_part
def paper(cfg: siri.Config, rounds: int, quick: bool) -> list[Row]:
    """The paper preset's policy: the 24 GB preset (4-bit) and the 48 GB preset (bf16), on ragged prompts of 430 tokens on average
    (ALFWorld's) and of 1,000.

    The weights are those of --model where that is a local folder, else random ones of Qwen2.5-7B's shape: time and memory do not
    depend on their values. Other sides, in the same process: `generate` in lock step, and peft's own LoRA layers. Beside a rate
    is what the device's measured bandwidth or bf16 speed allows: a decoding step has to read the weights once and the cache of
    every row; an update makes four passes of 2 FLOP per weight and token (reference, forward, recomputation, backward to the
    activations; attention, adapter and head not counted)."""
    if not torch.cuda.is_available() and not quick:
        return skipped("paper", "no CUDA device")
    if shutil.disk_usage(tempfile.gettempdir()).free < 20 * 2**30 and not quick:
        return skipped("paper", f"{tempfile.gettempdir()} has no 20 GiB free for random weights (another folder: $TMPDIR)")
    device, out = "cuda" if torch.cuda.is_available() else "cpu", []
    bandwidth, flops = ceilings(device)
    with tempfile.TemporaryDirectory() as folder:
        model = cfg.model if (Path(cfg.model) / "config.json").exists() and not (quick or cfg.compact) else folder
        if model == folder:
            random_model(Path(folder), SMALL if quick else QWEN_7B, device)
        for name, settings in (("24 GB, 4-bit", dict(preset="paper", memory_gib=22.0)),
                               ("48 GB, bf16", dict(preset="paper48", memory_gib=44.0)))[:1 if quick else 2]:
            if quick:
                settings |= dict(four_bit=False, max_prompt=64, max_response=8, group_size=2)
            gc.collect()                                        # the policy before
            torch.cuda.empty_cache()
            out += paper_preset(name, resolve(settings | dict(model=str(model)))[0], rounds, bandwidth, flops)
    return out


def paper_preset(name: str, cfg: siri.Config, rounds: int, bandwidth: float, flops: float) -> list[Row]:
    """The rows of `paper` for one preset."""
    took, policy = seconds(lambda: Policy(cfg))
    config, made_up = policy.model.config, Path(cfg.model).parent == Path(tempfile.gettempdir())
    weights = sum(p.numel() * p.element_size() for n, p in policy.model.named_parameters() if "lora_" not in n)
    keys = config.hidden_size // config.num_attention_heads * config.num_key_value_heads                # width of keys
    numbers = config.num_hidden_layers * config.hidden_size * (2 * config.hidden_size + 2 * keys + 3 * config.intermediate_size)
    cache = 2 * config.num_hidden_layers * keys * 2                                                     # bytes per token
    n = min(cfg.groups * cfg.group_size, policy.gen_tokens // (cfg.max_prompt + cfg.max_response))
    one = lambda what, unit, values, *more, **and_more: row("paper", f"{name}: {what}", unit, values, *more, **and_more)
    rows = [one("load and fit", "s", [took], model="random weights" if made_up else Path(cfg.model).name,
                gen_tokens=policy.gen_tokens, update_tokens=policy.update_tokens, rows=n, lock_step=policy.lock_step)]
    hours: dict[int, float] = {}
    for mean in (430, 1000) if cfg.max_prompt >= 1500 else (cfg.max_prompt // 2,):
        talk = Talk(policy, n, mean)
        found = alternate(rounds, ours=partial(talk.measure, policy), lock_step=partial(talk.measure, in_lock_step(policy)))
        ours, theirs = found["ours"], found["lock_step"]
        share = [100 * (weights + n * cache * mean) / bandwidth / ms * 1000 for ms in ours["step"]]
        rows += [one(f"prefill, {n} ragged prompts of {mean}", "tokens/s", ours["prefill"], "generate", theirs["prefill"]),
                 one(f"decoding step, {n} rows of {mean}", "ms", ours["step"], "generate", theirs["step"]),
                 one(f"decoding, rows of {mean}, of the bandwidth bound", "%", share, bandwidth=bandwidth),
                 one(f"rollout, {n} episodes, prompts of {mean}", "new tokens/s", ours["rate"], "generate", theirs["rate"]),
                 one(f"rollout, prompts of {mean}, live rows", "%", ours["live"])]
        hours[mean] = median(ours["turn"]) / 3600
    rows += [one(what, unit, [value]) for what, unit, value in talk.graphs()]
    train = trainer(policy, talk.prompts[:max(1, policy.update_tokens // (2 * mean))])
    found = alternate(rounds, ours=partial(train, True), peft=partial(train, False))
    ours = found["ours"]["rate"]
    rows += [one("update, reference included", "tokens/s", ours, "peft's layers", found["peft"]["rate"]),
             one("update, of the FLOP bound", "%", [100 * 8 * numbers * rate / flops for rate in ours], flops=flops)]
    taken = torch.cuda.max_memory_reserved() / 2**30 if policy.device == "cuda" else peak_gib()
    rows += [one("peak memory taken from the device", "GiB", [taken], require=f"<= {cfg.memory_gib:g}"),
             one("peak memory of tensors", "GiB", [peak_gib()])]
    # A run: 25 steps an episode. Internalization goes over the window's guided steps, half of which have a weight, without a
    # reference. Five evaluations of 140 games.
    episodes, iterations = cfg.groups * cfg.group_size, (cfg.warmup_max, cfg.mining_max, cfg.distill_max)
    for mean, turn in hours.items():
        step = (mean + NEW_TOKENS) / median(ours) / 3600
        iteration = 25 * episodes * (turn + step)
        whole = (sum(iterations) * iteration + 5 * 140 * 25 * turn
                 + iterations[2] * cfg.distill_window * cfg.distill_epochs * 25 * episodes / 4 * step * 3 / 4)
        rows += [one(f"iteration of {episodes} episodes of 25 steps, {mean} tokens", "h, projected", [iteration]),
                 one(f"whole run of {sum(iterations)} iterations, {mean} tokens", "h, projected", [whole])]
    return rows


NEW_TOKENS = 45                 # of an answer in `Talk`, on average


class Talk:
    """Made-up episodes: ragged prompts, 1 to 7 turns, answers of 10 to 80 tokens, which the first token of each decides."""

    def __init__(self, policy: Policy, n: int, mean: int) -> None:
        rng = random.Random(mean)
        self.mean, self.policy = mean, policy
        prompt = lambda: [rng.randrange(10, policy.vocab - 10) for _ in range(rng.randint(mean * 11 // 20, mean * 29 // 20))]
        self.turns = [[prompt() for _ in range(rng.randint(1, 7))] for _ in range(n)]
        self.prompts = [turns[0] for turns in self.turns]
        self.longest = mean * 29 // 20

    def measure(self, policy: Policy, _: int) -> dict[str, float]:
        """Tokens read a second, milliseconds of a step, and a rollout: new tokens a second, seconds a turn, share of live rows."""
        policy, said = copy.copy(policy), [0]
        policy.work, n = Counter(), len(self.prompts)
        asks = [*enumerate((prompt, i) for i, prompt in enumerate(self.prompts))]

        def answered(k: int) -> float:
            policy.ended = lambda ids: len(ids) == k
            return seconds(lambda: policy.answer_all(iter(asks), lambda *_: None, 1.0, k, n, self.longest))[0]

        answered(2)                                                             # what is made on first use
        first, more = answered(1), answered(17)
        turn = [0] * n

        def follow(i: int, ids: list[int]) -> Any:
            turn[i] += 1
            said[0] += len(ids)
            return (self.turns[i][turn[i]], 100 * turn[i] + i) if turn[i] < len(self.turns[i]) else None

        policy.ended = lambda ids: len(ids) >= 10 + ids[0] % 71
        policy.work.clear()
        took, _ = seconds(lambda: policy.answer_all(iter(asks), follow, 1.0, 80, n, self.longest))
        return dict(prefill=sum(map(len, self.prompts)) / first, step=1000 * (more - first) / 16, rate=said[0] / took,
                    turn=took / sum(turn), live=100 * policy.work["live"] / max(policy.work["rows"], 1))

    @torch.no_grad()
    def graphs(self) -> list[tuple[str, str, float]]:
        """What a CUDA graph costs and holds: seconds to capture a shape, memory, kernels of a step and how long they keep the
        device busy; and how far a replayed step is from the eager one. Nothing without a CUDA device."""
        if self.policy.device != "cuda":
            return []
        n, longest = len(self.prompts), self.longest + 8
        decoder = self.policy.decoder(n, longest + 16)
        decoder.admit(0, self.prompts)
        before = torch.cuda.memory_reserved()
        capture = seconds(lambda: decoder.step(n, longest))[0]
        pool, at = (torch.cuda.memory_reserved() - before) / 2**30, decoder.at.clone()
        replayed = decoder.step(n, longest).clone()
        rows, length = next(iter(decoder.shapes))
        decoder.at.copy_(at + 1)
        off = (decoder.forward(rows, length)[:n] - replayed).abs().max().item()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            decoder.step(n, longest)
            wait_for_device()
        kernels = [e for e in seen.events() if str(e.device_type).endswith("CUDA")]
        return [("capturing a shape", "s", capture), ("memory of its graph", "GiB", pool),
                ("kernels of a step", "", float(len(kernels))),
                ("device busy in a step", "ms", sum(e.device_time_total for e in kernels) / 1000),
                ("replayed step's distance from the eager one", "logits", off)]


def trainer(policy: Policy, prompts: list[list[int]]) -> Callable[[bool, int], dict[str, float]]:
    """Updates on these prompts with answers of NEW_TOKENS, by our LoRA layers or by peft's own; weights stay as they are."""
    optimizer, n = make_optimizer(policy), min(NEW_TOKENS, policy.cfg.max_response)
    cfg = dataclasses.replace(policy.cfg, lr=0.0, weight_decay=0.0)
    for group in optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    rows = [siri.Row(p, q[:n], 1.0) for p, q in zip(prompts, prompts[1:] + prompts[:1])]
    layers = [module for module in policy.model.modules() if "forward" in vars(module) and hasattr(module, "lora_A")]
    lean = [layer.forward for layer in layers]

    def train(ours: bool, k: int) -> dict[str, float]:
        for layer, forward in zip(layers, lean):
            layer.forward = forward if ours else type(layer).forward.__get__(layer)
        took, stats = seconds(lambda: siri.update(policy, optimizer, rows, [], 0.0, cfg, np.random.default_rng(k)))
        for layer, forward in zip(layers, lean):
            layer.forward = forward
        return dict(rate=stats["row_tokens"] / took)

    return train


# ---- 8. The report -------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures were measured with and on."""
    versions = dict(python=platform.python_version())
    for package in ("torch", "transformers", "peft", "trl", "alfworld", "textworld"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    info = Path("/proc/cpuinfo")
    names = [x.partition(":")[2].strip() for x in info.read_text().splitlines() if x.startswith("model name")] \
        if info.exists() else []
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                         capture_output=True, text=True)
    return dict(versions=versions, processor=names[0] if names else platform.processor() or platform.machine(),
                cores=os.cpu_count(), threads=torch.get_num_threads(),
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
                commit=git.stdout.strip() if git.returncode == 0 else None)


def line(r: Row) -> str:
    """A row as text: part, what, ours, other, ratio, requirement."""
    if "skipped" in r:
        return f"{r['part']:<12} skipped: {r['skipped']}"
    show = lambda s: f"{s['median']:.4g} [{s['min']:.4g}, {s['max']:.4g}]" if s else ""
    verdict = f"{r['require']} {'yes' if r['met'] else 'NO'}" if r["require"] else ""
    return (f"{r['part']:<12} {r['what']:<40} {r['unit']:<16} {show(r['ours']):<28} {r['than'] or '':<16} "
            f"{show(r['other']):<28} {show(r['ratio']):<24} {verdict}").rstrip()


def markdown(report: dict[str, Any]) -> str:
    """A report's rows as the table that docs/performance.md shows."""
    number = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    show = lambda s: "" if not s else number(s["median"]) + (
        f" [{number(s['min'])}, {number(s['max'])}]" if s["min"] < s["max"] else "")
    lines = ["| part | what | unit | ours | beside | theirs | ours / theirs | required |", "|---|---|---|---|---|---|---|---|"]
    for r in report["rows"]:
        cells = [r["part"], f"skipped: {r['skipped']}"] + [""] * 6 if "skipped" in r else [
            r["part"], r["what"] + (f" ({r['same']} answers the same)" if "same" in r else ""), r["unit"], show(r["ours"]),
            r["than"] or "", show(r["other"]), show(r["ratio"]),
            f"{r['require']}: {'yes' if r['met'] else '**no**'}" if r["require"] else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


HEADER = (f"{'part':<12} {'what':<40} {'unit':<16} {'ours: median [min, max]':<28} {'beside':<16} "
          f"{'median [min, max]':<28} {'ours / other':<24} required")


def main(parts: Sequence[str], cfg: siri.Config, rounds: int = 5, quick: bool = False,
         path: str | Path = "bench.json") -> dict[str, Any]:
    """Run the parts named (none: all), print the table, write it as JSON after every part, and return it. UserError for
    an unknown part, and if `path` can't be written."""
    from transformers import logging
    for name in parts:
        if name not in PARTS:
            raise UserError(f"--bench {name}: unknown part; choose from {', '.join(PARTS)}")
    report = dict(machine(), rounds=rounds, quick=quick, seed=cfg.seed, rows=[])
    try:
        write_json(Path(path), report)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); run in a folder of your own") from e
    logging.set_verbosity_error()           # the tiny policy's context is declared as 512, which fixed shapes exceed
    print(", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    print(f"{report['processor']}, {report['cores']} cores, {report['threads']} threads; device {report['device']}; "
          f"commit {report['commit']}; {report['date']}; {rounds} rounds"
          f"{'; SHRUNK for a test, figures mean nothing' if quick else ''}\n{HEADER}", flush=True)
    for name in parts or PARTS:
        rows = PARTS[name](cfg, rounds, quick)
        report["rows"] += rows
        write_json(Path(path), report)
        print("\n".join(map(line, rows)), flush=True)
    checked = [r for r in report["rows"] if r.get("require")]
    print(f"{sum(r['met'] for r in checked)} of {len(checked)} requirements met; all figures are in {path}")
    return report


def command(parts: str, given: dict[str, Any]) -> None:
    """`--bench`: parts separated by commas, "" for all."""
    main([name for name in parts.split(",") if name], resolve(given)[0])
