"""Will a model do? `python siri.py --probe --model NAME` asks it, in minutes, what training would ask it.

It sees first and later steps of training tasks under the very prompts of a run, answers at the training temperature, and sums up
won tasks as skills. Shown are the shares of answers that can be parsed and of those that are admissible, tokens per answer, the
share of skills that are well formed and why others are not, seconds, and some answers whole.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import envs
import siri
import skills
from policy import Policy, UserError
from tools.oracle import walked, winning_actions
from tools.settings import make_environment, resolve
from tools.terminal import say

STATES, ANSWERS, WINS, SHOWN = 48, 2, 48, 3         # prompts, answers to each, wins to mine, answers that are printed


def followed(env: envs.Environment, task: envs.Task, actions: Sequence[str], steps: int, rng: random.Random) -> siri.Episode:
    """An episode after so many steps: along a winning way, with one step in three at random, as a policy would stray."""
    game = env.open(task)
    episode, way = siri.Episode(task, None, state=game.start), list(actions)
    while not episode.state.done and len(episode.steps) < steps and way:
        state, action = episode.state, way.pop(0)
        if rng.random() < 1 / 3:
            way.insert(0, action)
            action = rng.choice([a for a in state.admissible if "<your query>" not in a])
        after = game.step(state, action)
        if not after.done:
            episode.steps.append(siri.Step([], [], "", action, state.observation, state.anchor, None))
            episode.state = after
    game.close()
    return episode


def ask(policy: Policy, env: envs.Environment, states: int, answers: int) -> tuple[dict[str, Any], list[str]]:
    """Shares of answers that are parsable and admissible, tokens per answer, and the texts. n is states times answers."""
    cfg, rng, tasks = policy.cfg, random.Random(policy.cfg.seed), env.tasks("train")
    episodes = []
    for k in range(states):
        task = tasks[rng.randrange(len(tasks))]
        episodes.append(followed(env, task, winning_actions(env, task), (0, 1, 2, 4)[k % 4], rng))
    asked = [e for e in episodes for _ in range(answers)]
    started = time.perf_counter()
    said = policy.generate([siri.fit_prompt(policy, e, None) for e in asked], cfg.temperature, cfg.max_response)
    texts = [policy.answer(ids) for ids in said]
    actions = [envs.parse_action(text) for text in texts]
    return dict(n=len(asked), parsable=sum(a is not None for a in actions),
                admissible=sum(valid(env, e, a) for e, a in zip(asked, actions)), tokens=sum(map(len, said)) / len(said),
                cut=sum(len(ids) == cfg.max_response for ids in said), seconds=time.perf_counter() - started), texts


def valid(env: envs.Environment, e: siri.Episode, action: str | None) -> bool:
    """Whether the world takes the action: one that is offered, or a search in words of its own."""
    return action is not None and (action in e.state.admissible or (
        action.startswith("search[") and any("<your query>" in offered for offered in e.state.admissible)))


def mine(policy: Policy, env: envs.Environment, wins: int) -> tuple[dict[str, Any], list[str]]:
    """How many skills from wins on different tasks are well formed, why the others are not, and the texts."""
    cfg, tasks, prompts = policy.cfg, env.tasks("train"), []
    for k in range(wins):
        task = tasks[(7 * k) % len(tasks)]
        with_results = [(action, after.observation) for _, action, after in walked(env, task)]
        prompts.append(policy.encode(skills.mining_prompt(task.goal, with_results, cfg.prompt_style, max_words=cfg.skill_words)))
    started = time.perf_counter()
    texts = [policy.answer(ids) for ids in policy.generate(prompts, cfg.temperature, max(cfg.max_response // 2, 24))]
    found: Counter[str] = Counter()
    for text in texts:
        try:
            skills.parse_skill(text, max_words=cfg.skill_words)
            found["well formed"] += 1
        except skills.SkillRejected as e:
            found[e.reason] += 1
    return dict(found, n=wins, seconds=time.perf_counter() - started), texts


def command(_: str, given: dict[str, Any]) -> None:
    """`--probe`: load the model, ask it, and print what came. UserError as `Policy` and `make_environment`."""
    cfg = resolve(given)[0]
    env = make_environment(cfg)
    say(env.notice)
    policy = Policy(dataclasses.replace(cfg, update_tokens=1))          # nothing is trained: no probe of its memory
    if not winning_actions(env, env.tasks("train")[0]):
        raise UserError(f"--probe: no way to win is known for {cfg.env}; play a few steps with --play")
    say(f"model {cfg.model}, {cfg.prompt_style} prompts, temperature {cfg.temperature}: {STATES * ANSWERS} answers, {WINS} skills")
    steps, texts = ask(policy, env, STATES, ANSWERS)
    say(f"answers: parsable {steps['parsable'] / steps['n']:.2f}, admissible {steps['admissible'] / steps['n']:.2f} of "
        f"{steps['n']}; {steps['tokens']:.0f} tokens each, {steps['cut']} cut at --max-response {cfg.max_response}; "
        f"{steps['seconds']:.0f} s")
    mined, wrote = mine(policy, env, WINS)
    others = ", ".join(f"{reason} {mined[reason]}" for reason in skills.REASONS if mined.get(reason))
    say(f"skills: well formed {mined.get('well formed', 0) / mined['n']:.2f} of {mined['n']}{f' ({others})' if others else ''}; "
        f"{mined['seconds']:.0f} s")
    for kind, some in (("answer", texts[:SHOWN * ANSWERS:ANSWERS]), ("skill", wrote[:SHOWN])):
        for text in some:
            say(f"--- {kind}\n{text}")
