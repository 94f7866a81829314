"""A cold start [O], off by default: where a model wins nothing, it imitates won games before warm-up.

Reinforcement learning learns from wins, and from none there is nothing to learn. With `--imitate N` the base is evaluated
first; if it wins no game of the panel, it learns the answers that win N training games, a short thought and an action for each
step, by maximum likelihood. What is then measured as "base" has imitated, and results.json says so. Neither the paper nor the
release does this: both begin with a model that wins now and then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

import envs
import siri
from policy import Policy, UserError
from tools.oracle import walked, winning_actions
from tools.terminal import say

GAMES_AT_ONCE = 8           # between two lines of progress: some 60 steps, one optimizer step


def answer(policy: Policy, action: str) -> tuple[list[int], str]:
    """The ids and the text of a response that takes this action, after what the chat template has begun."""
    thought, text = f"The next step is to {action}.", f"<action>{action}</action>"
    if "</think>" not in policy.chat.opening:
        text = ("" if policy.chat.opening else "<think>") + f"{thought}</think>{text}"
    return policy.tokenizer(text, add_special_tokens=False).input_ids, text


def demonstration(policy: Policy, env: envs.Environment, task: envs.Task) -> list[siri.Row]:
    """A row for each step of a won game, in which every token of the response counts alike; none for one that can't be won."""
    e, rows = siri.Episode(task, None), []
    for e.state, action, after in walked(env, task):
        prompt, (response, text) = siri.fit_prompt(policy, e, None), answer(policy, action)
        rows.append(siri.Row(prompt, response, gate=[True] * len(response), weight=1.0))
        e.steps.append(siri.Step(prompt, response, text, action, e.state.observation, e.state.anchor, None))
        e.success = after.success
    return rows if e.success else []


def imitate(learner: siri.Learner, tasks: Sequence[envs.Task]) -> None:
    """Learn the demonstrations of these tasks, with a line of progress for every GAMES_AT_ONCE. UserError as `siri.update`."""
    cfg = dataclasses.replace(learner.cfg, distill_epochs=1)
    for group in learner.optimizer.param_groups:
        group["lr"] = cfg.imitate_lr
    with tqdm(total=len(tasks), desc="imitation", unit="game", dynamic_ncols=True, leave=False, disable=None) as bar:
        for at in range(0, len(tasks), GAMES_AT_ONCE):
            part = tasks[at:at + GAMES_AT_ONCE]
            rows = [row for task in part for row in demonstration(learner.policy, learner.env, task)]
            stats = siri.update(learner.policy, learner.optimizer, [], rows, 1.0, cfg, np.random.default_rng([cfg.seed, 5, at]))
            say(f"{at + len(part):4d} games imitated  {stats['int_loss']:.3f} nats a token  {len(rows)} steps")
            bar.update(len(part))


def cold_start(learner: siri.Learner, record: Callable[[siri.Evaluation], None]) -> None:
    """Evaluate the base, and imitate `--imitate` training games if it won nothing. UserError where no way to win is known, and
    as `siri.evaluate` and `siri.update`."""
    cfg, env, tasks = learner.cfg, learner.env, learner.env.tasks("train")
    if not winning_actions(env, tasks[0]):
        raise UserError(f"--imitate: no way to win is known for {cfg.env}; leave it out")
    base = siri.evaluate(learner.policy, env, siri.panel_tasks(cfg, env), cfg, "before imitation")
    record(base)
    if any(e.success for e in base.episodes):
        say("the base wins games by itself: nothing is imitated")
        return
    order = np.random.default_rng([cfg.seed, 6]).permutation(len(tasks))
    imitate(learner, [tasks[int(order[i % len(tasks)])] for i in range(cfg.imitate)])
