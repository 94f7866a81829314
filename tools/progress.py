"""How far a run is: two bars on a terminal, one of iterations and one of the work within an iteration or an evaluation; a line now
and then where standard error is a file. The method knows neither: it tells `policy.tick` what it has done."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

import siri
from siri import PHASES, VARIANTS
from tools.terminal import say

EVERY = 120                 # seconds of work after which a line says how far it is
PACE = 10                   # iterations whose mean duration the next ones are expected to take


def clock(seconds: float) -> str:
    """A duration in the two units that matter.

    >>> clock(48), clock(130), clock(11_520), clock(187_200)
    ('48s', '2m', '3h12', '2d04h')
    """
    minutes = int(seconds / 60)
    return (f"{seconds:.0f}s" if seconds < 60 else f"{minutes}m" if minutes < 60 else
            f"{minutes // 60}h{minutes % 60:02d}" if minutes < 24 * 60 else f"{minutes // 1440}d{minutes // 60 % 24:02d}h")


def iterations_left(learner: siri.Learner) -> int:
    """At most so many until the run ends; with a budget of steps or tokens, as far as those of an iteration so far tell."""
    cfg, p = learner.cfg, learner.progress
    left = sum(siri.phase_limit(cfg, phase) for phase in range(p.phase, 3)) - learner.age
    for spent, budget, _ in siri.budgets(learner):
        if budget and spent:
            left = min(left, math.ceil(max(budget - spent, 0) * p.iteration / spent))
    return left


def games_left(learner: siri.Learner) -> int:
    """Games of the evaluations until the run ends, as `siri.train` plays them."""
    cfg, p, panel = learner.cfg, learner.progress, len(learner.env.tasks(learner.cfg.split))
    phases = [phase for phase in VARIANTS[cfg.variant].phases if phase >= p.phase]
    whole = len(phases) + (1 in phases[:-1])            # after mining the bank is measured, too
    points = iterations_left(learner) // cfg.eval_every if cfg.eval_every else 0
    return whole * min(cfg.panel or panel, panel) + points * min(cfg.eval_panel, cfg.panel or panel, panel)


class Work:
    """A piece of work, as `policy.tick` is told of it. `outlook` is what a line says besides."""

    def __init__(self, outlook: Callable[[], str] = lambda: "", row: int = 0) -> None:
        self.outlook, self.name, self.of, self.done, self.started, self.said = outlook, "", 0, 0, 0.0, 0.0
        self.bar = tqdm(total=1, position=row, leave=False, disable=None, dynamic_ncols=True, file=sys.stderr,
                        bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]")

    def __call__(self, name: str, done: int, of: int) -> None:
        now = time.monotonic()
        if (name, of) != (self.name, self.of) or done < self.done:
            self.name, self.of, self.started, self.said = name, of, now, now
            self.bar.set_description(name, refresh=False)
            self.bar.reset(of)
        self.done = done
        self.bar.update(done - self.bar.n)
        if self.bar.disable and now - self.said >= EVERY:
            self.said = now
            left = f", {clock((now - self.started) / done * (of - done))} to go" if done else ""
            say(f"     {name} {done}/{of}{left}{self.outlook()}")

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


class Progress:
    """How far a run is, and when it will have ended at the latest."""

    def __init__(self, learner: siri.Learner) -> None:
        self.learner, self.pace, self.game = learner, deque[float](maxlen=PACE), 0.0            # seconds
        self.bar = tqdm(total=1, leave=False, disable=None, dynamic_ncols=True, file=sys.stderr,
                        bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}")
        self.work = learner.policy.tick = Work(lambda: f"; run: eta {self.eta()}" * bool(self.pace), row=1)
        self.show(learner.progress.phase)

    def eta(self) -> str:
        """How long the run will take; empty before the first iteration."""
        games = self.game * games_left(self.learner)
        return clock(iterations_left(self.learner) * float(np.mean(self.pace)) + games) if self.pace else ""

    def iterated(self, row: Mapping[str, Any]) -> None:
        """An iteration has ended, with this row of metrics."""
        self.pace.append(row["rollout_s"] + row["update_s"])
        rates = [f"{name} {row[f'success_{name}']:.2f}" for name in ("plain", "skill") if row[f"n_{name}"]]
        rates += [f"{row['rollout_tokens_per_s']:.0f} tok/s", f"eta {self.eta()}"]
        self.bar.set_postfix_str(", ".join(rates), refresh=False)
        self.show(row["phase"])

    def evaluated(self, played: siri.Evaluation) -> None:
        """A panel has been played."""
        self.game = played.seconds / len(played.episodes)

    def show(self, phase: int) -> None:
        """Draw the bar of iterations, the last of which was in this phase."""
        done = self.learner.progress.iteration
        self.bar.set_description(PHASES[phase], refresh=False)
        self.bar.n, self.bar.total = done, done + iterations_left(self.learner)
        self.bar.refresh()

    def close(self) -> None:
        """Take the bars away."""
        self.work.close()
        self.bar.close()
