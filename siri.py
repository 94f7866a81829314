"""SIRI: an agent that learns from its own skills. The method, top to bottom, as an algorithm box has it.

    python siri.py --env alfworld            train: warm-up, skill mining, internalization (`run.py` is the program)

    for each iteration:  roll out groups of G episodes                          `rollout`, `plain_plan`, `paired_plan`
                         phase 1: write skills from own wins, and weigh each by half of a group    `mine`, `record_effects`
                         A = A^E + omega A^S - c [invalid]                                             `assign_advantages`
                         phase 2: w = gate x clip(A), for what a good skill led to                  `internalization_rows`
                         minimise L_GiGPO + beta L_KL + lambda L_int                                 `step_loss`, `update`

Sections: 1 settings, 2 rollout, 3 what a rollout was worth, 4 rows, 5 loss, 6 an iteration, 7 the three phases, 8 evaluation.
`train` is a generator of events, and neither prints nor saves: the one loop that consumes it is in `run.py`, a notebook may
write its own. Where is ... a skill put into the prompt: `fit_prompt`; a group split into pairs: `paired_plan`; the loss:
`step_loss`; the gate: `internalization_rows`, by `distill.action_gate`; the reward: `envs.SUCCESS_REWARD`, and what changes
with it: `advantage_unit`.

The mathematics is pure and elsewhere: `gigpo.py` (G1-G8), `skills.py` (S1-S6), `distill.py` (S7-S10); worlds are in `envs.py`,
the model is in `policy.py`. [P] is the SIRI paper (arXiv 2606.02355), [R] the GiGPO release (arXiv 2505.10978), [O] our choice
where the paper's is not public; what differs from both, and why, is in docs/deviations.md.
"""

from __future__ import annotations

# `python siri.py` starts the program, which is in run.py and imports this file like any other; the method imports nothing above it.
if __name__ == "__main__":
    import sys
    from os.path import dirname

    sys.path.insert(0, dirname(__file__))       # Python leaves it out under -P; and no other module called `run` shall come first
    import run
    sys.exit(run.main())

import dataclasses
import datetime
import hashlib
import math
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

import distill
import envs
import gigpo
import skills
from decode import Answer, Ask
from policy import Policy, UserError, make_optimizer
from skills import count, number

PHASES = ("warm-up", "mining", "internalize")
RECENT = 3                  # iterations whose plain success is averaged before warm-up may end
BAD_STEPS = 3               # optimizer steps in a row without a finite gradient that end a run
LOST_AT_MOST = 0.05         # share of groups or games that may be lost to broken environments (of 40, while there are fewer)


# ---- 1. Settings ---------------------------------------------------------------------------------------------

def setting(default: Any, meaning: str, form: skills.Form | None = None, *, choices: Sequence[str] = (), section: str = ""):
    """A field of `Config`: its default, its meaning with unit and source, and what it may be: a number above 0, unless a form
    or choices are given. `section` opens a group of fields. The command line, its help, the check of saved settings and
    docs/settings.md are all made from this."""
    form = skills.choice(choices) if choices else form or {
        bool: skills.FLAG, str: skills.TEXT, int: skills.count(1), float: skills.number(above=0)}[type(default)]
    return field(default=default, metadata=dict(meaning=meaning, form=form, section=section))


def is_day(text: Any) -> bool:
    """Whether this is an ISO date, or empty."""
    try:
        return text == "" or bool(datetime.date.fromisoformat(text))
    except (TypeError, ValueError):
        return False


SPLITS = {"alfworld": ("train", "valid_seen", "valid_unseen"), "webshop": ("train", "validation", "test")}


@dataclass(frozen=True)
class Variant:
    """The method with a part left out (an ablation), or whole."""
    phases: tuple[int, ...] = (0, 1, 2)
    matched: bool = True        # S3: a group gets the skill that fits its task; else any
    validated: bool = True      # S4-S6: a skill is used by what its pairs measured; else all are, the oldest that fits first
    gated: bool = True          # S7: only helpful skills are distilled; else all
    weighted: bool = True       # S8: in proportion to the advantage; else all alike
    guided: bool = True         # S9: what a skill led to is distilled; else plain wins, and no skill is there at all


VARIANTS = {"siri": Variant(), "gigpo": Variant(phases=(0,)), "no_warmup": Variant(phases=(1, 2)),
            "random_skill": Variant(matched=False), "no_validation": Variant(validated=False, gated=False),
            "no_gate": Variant(gated=False), "no_advantage": Variant(weighted=False),
            "distill_plain": Variant(phases=(0, 2), gated=False, guided=False)}


@dataclass
class Config:
    """Every setting of a run. The command line has a flag for each field; presets (`tools/settings.py`) are sets of overrides."""
    # The defaults are the paper's setting on ALFWorld: Qwen2.5-7B-Instruct in 4 bits on one 24 GB GPU.
    env: str = setting("alfworld", "alfworld, webshop, or a class of your own: FILE.py:Class or package.module:Class "
                       "(docs/own-environment.md)", skills.PHRASE, section="task")
    env_hash: str = setting("", "fingerprint of an own class's file; made when a run begins, and a change is said from then on")
    alfworld_data: str = setting("", "folder that holds json_2.1.1/; default $ALFWORLD_DATA, else generated games")
    generated: bool = setting(False, "generated games or shop on purpose, where a preset is for the benchmark's own data")
    webshop_data: str = setting("", "folder that holds items_shuffle*.json; default a generated catalogue")
    webshop_size: str = setting("small", "the first 1,000 products (small) [R] or all", choices=("small", "full"))
    webshop_goals: str = setting("synthetic", "goals of the data files [R: synthetic]", choices=("synthetic", "human"))
    webshop_split: str = setting("original", "500 test, 1,000 validation goals; release: 500, 0 [R]", choices=[*envs.SHOP_SPLITS])
    webshop_tagger: str = setting("auto", "nouns of titles: stop-list or an installed spaCy model; auto: the latter if any")
    observation: str = setting("text", "how WebShop's pages are written", choices=("text", "text_rich"))
    compact: bool = setting(False, "small generated worlds, one household or shop (the tiny policy's) [O]")
    max_steps: int = setting(50, "actions per episode; WebShop 15 [R], an own class its `max_steps`")
    prompt_style: str = setting("full", "prompts for instruct models (full) or the tiny policy", choices=("full", "compact"))
    history: int = setting(2, "observation-action pairs in the prompt [R]", count(0))
    preset: str = setting("auto", "auto: by device memory, tiny without a device or data",
                          choices=("auto", "small", "paper", "paper48", "tiny", "smoke"), section="policy")
    model: str = setting("Qwen/Qwen2.5-7B-Instruct", "hub id or local folder [P]")
    base: str = setting("", "fingerprint of the base model; made when a run begins, and another model is refused from then on")
    four_bit: bool = setting(True, "NF4 weights with bf16 compute; needs CUDA")
    lora_r: int = setting(64, "LoRA rank [R]")
    lora_alpha: int = setting(128, "LoRA scale is alpha / r [O]")
    max_prompt: int = setting(2048, "prompt tokens, WebShop 4096; longer ones lose history first, never the skill [R]")
    max_response: int = setting(512, "sampled tokens per step [R]")
    thinking: bool = setting(True, "where a chat template has the choice (Qwen3's enable_thinking): long thoughts of the model; "
                             "off: it begins with an empty one")
    date: str = setting("", "the day that a chat template takes for today, as 2026-01-31; default the day on which a run began",
                        skills.Form(is_day, "a day, as 2026-01-31"))
    temperature: float = setting(1.0, "sampling temperature while training [R]")
    eval_temperature: float = setting(0.4, "sampling temperature while evaluating, 0 is greedy [R]", number(0))
    memory_gib: float = setting(0.0, "device memory that may be taken, 0: all that is free; CUDA only", number(0))
    gen_tokens: int = setting(0, "padded tokens, answers included, generated at once; 0: what fits into memory", count(0))
    update_tokens: int = setting(0, "padded tokens per forward-backward pass (the gradient ignores it); 0: what fits", count(0))
    groups: int = setting(4, "tasks per iteration [O: the release has 16 on 8 GPUs]", section="GiGPO")
    group_size: int = setting(8, "G, rollouts per task [R]", count(2))
    gamma: float = setting(0.95, "gamma, discount of step returns, G4 [R]", number(above=0, most=1))
    omega: float = setting(1.0, "omega, weight of the step advantage, G6 [R]", number(0))
    norm: str = setting("std", "F, advantage norm, G2: std, WebShop mean [R]", choices=("std", "mean"))
    baseline: str = setting("trajectory", "what G2's mean is over, in the paper and the release", choices=("trajectory", "steps"))
    similarity: float = setting(0.0, "likeness of texts that makes states one anchor, G3; 0: equal ones [R]", number(0, most=0.999))
    invalid_penalty: float = setting(0.2, "c of G6, off an invalid step's advantage, in standard deviations [O]", number(0))
    penalty_inside: bool = setting(False, "the release's form: the penalty, in units of reward, inside the normalised returns")
    lr: float = setting(3e-6, "AdamW learning rate [R]")
    weight_decay: float = setting(0.01, "of AdamW [R]", number(0))
    grad_clip: float = setting(1.0, "largest gradient norm [R]")
    clip: float = setting(0.2, "epsilon, ratio clip of G7 [R]")
    old: str = setting("update", "old log-probabilities of G7, where an iteration has several optimizer steps: from a forward pass "
                       "before the update, or the sampler's own, which saves the pass [O]", choices=("update", "sampler"))
    dual_clip: float = setting(0.0, "dual clip for negative advantages, above 1; 0 is off [R: option, 3]", number(0))
    kl_beta: float = setting(0.01, "beta, coefficient of the KL term, G8 [R]", number(0))
    minibatch: int = setting(256, "rows per optimizer step [R]")
    imitate: int = setting(0, "won training games to imitate first if the base wins no game of the panel; 0: none [O]", count(0),
                           section="phase 0: warm-up")
    imitate_lr: float = setting(1e-4, "learning rate of the imitation [O]")
    warmup_max: int = setting(60, "iterations at most [O]", count(0))
    n_req: int = setting(100, "N_succ, distinct tasks solved before phase 1 [P: rule, O: number]", count(0))
    floor: float = setting(0.3, "plain success (mean of the last 3 iterations) before phase 1; above 1: never [O]", number(0))
    mining_max: int = setting(60, "iterations at most [O]", count(0), section="phase 1: mining and validation")
    bank: str = setting("", "text file of skills to begin with, one a line: when CONDITION -> STRATEGY; default none")
    mine_every: int = setting(2, "I_mine, iterations between minings, S1; 0: nothing is mined [O]", count(0))
    mine_wins: int = setting(16, "successful plain trajectories summarised per mining [O]")
    skill_words: int = setting(40, "longest skill accepted, words [O]")
    bank_size: int = setting(200, "skills that are not retired, at most [O]")
    kappa: float = setting(2.0, "kappa, prior weight of the utility in pairings, S5 [O]", number(0))
    ema: float = setting(0.0, "b of a utility that is a moving average of effects (D2Skill: .1); 0: their mean, S5 [O]",
                         number(0, most=1))
    n_eval: int = setting(4, "N_eval, pairings before a verdict, S6 [O]")
    tau_up: float = setting(0.05, "promoted above this utility, S6; above 1: never [O]", number())
    tau_down: float = setting(0.0, "retired below this utility, S6; below -1: never [O]", number())
    m_retire: int = setting(2, "M_retire, evaluations in a row below tau_down, S6 [O]")
    min_similarity: float = setting(0.05, "a skill matches a task above this cosine, S3 [O]", number(0, most=1))
    top_k: int = setting(4, "matching skills among which the bound chooses, S3 [O]")
    ucb_c: float = setting(0.2, "width of the confidence bound, S3 [O]", number(0))
    active_req: int = setting(30, "active skills before phase 2 [O]", count(0))
    distill_max: int = setting(30, "iterations [O]", count(0), section="phase 2: internalization")
    distill_tokens: str = setting("action", "action (paper) or response, S7", choices=("action", "response"))
    pair_gain: bool = setting(True, "gate also on the pair's own effect, S7 [O]")
    a_max: float = setting(2.0, "A_max, advantage that gets weight 1, S8, in standard deviations [O]")
    weight_mean: str = setting("as is", "mean weight over gated tokens: as is (paper), or one, which keeps their proportions and "
                               "takes away that weights make steps smaller, S8 [O]", choices=("as is", "one"))
    lambda_max: float = setting(1.0, "lambda, coefficient of the internalization loss, S10 [O]", number(0))
    lambda_warm: int = setting(3, "K_warm, iterations, S10 [O]", count(0))
    distill_rows: int = setting(64, "gated steps per optimizer step [O]")
    distill_epochs: int = setting(1, "passes over the gated steps of an iteration's window [O]")
    distill_window: int = setting(12, "iterations whose guided steps are kept [O]")
    distill_min: int = setting(64, "gated steps before any internalization [O]")
    distill_lr: float = setting(1e-5, "learning rate of phase 2 [O]")
    distill_decay: bool = setting(False, "it falls over the iterations of phase 2, linearly to 0, so that the last ones settle [O]")
    variant: str = setting("siri", "the method, or an ablation", choices=tuple(VARIANTS), section="run")
    env_steps: int = setting(0, "stop after this many training environment steps, 0: no limit", count(0))
    train_tokens: int = setting(0, "stop after this many tokens of rows went through an update, 0: no limit", count(0))
    panel: int = setting(0, "games of the evaluation panel, 0: the whole split", count(0))
    split: str = setting("valid_seen", "split of the panel; WebShop test, an own class the last of its `splits`")
    kl_warn: float = setting(1.0, "a mean KL above this (nats per token) gets a warning [O]")
    entropy_warn: float = setting(0.01, "a mean entropy below this (nats per token) gets a warning [O]")
    base_eval: bool = setting(True, "play the panel before the first iteration, too")
    eval_every: int = setting(0, "iterations from one point of the curve to the next: the plain policy on a small panel; 0: none",
                              count(0))
    eval_panel: int = setting(24, "games of that small panel, the first of the whole one")
    track: str = setting("none", "log to a tracker, too: a package to install by itself",
                         choices=("none", "tensorboard", "trackio", "wandb"))
    keep_phases: bool = setting(False, "keep the checkpoints with which each phase began and ended, to branch ablations from")
    save_every: int = setting(1, "iterations between checkpoints: so many are repeated after a crash, at most")
    sample_every: int = setting(10, "iterations between sample episodes")
    seed: int = setting(0, "of all random draws, and the number of a generated world", count(0))
    name: str = setting("", "run folder under runs/; default from env, preset, variant and seed")


# ---- 2. Rollout: the one function that plays, for warm-up, pairs and evaluation -------------------------------------

@dataclass
class Step:
    """What the policy saw in one step, what it sampled, and what came of it."""
    prompt: list[int]
    response: list[int]         # sampled ids, the stop token included
    text: str
    action: str                 # what was sent to the environment; "" when unparsable
    observation: str
    anchor: str                 # G3
    plain: list[int] | None     # the same step's prompt without the skill (S9); None when there was no skill
    result: str = ""            # the observation that followed
    reward: float = 0.0
    valid: bool = True
    advantage: float = 0.0      # G6


@dataclass
class Episode:
    """One rollout of a task, with a skill in its prompts or without (S4)."""
    task: envs.Task
    skill: skills.Skill | None
    steps: list[Step] = field(default_factory=list)
    state: envs.State = field(default=None, repr=False)             # type: ignore[assignment]    # where it is now
    prompt: list[int] = field(default_factory=list, repr=False)     # of its next step
    success: bool = False
    score: float = 0.0                                              # 0..1; 1 is success
    overlong: str = ""                                              # why it ended early: a prompt that can't be cut to max_prompt

    def told(self) -> tuple[Any, ...]:
        """What came of it, as JSON, for ranks that did not play it."""
        return self.success, self.score, self.overlong, [vars(s) | dict(logp=getattr(s.response, "logp", [])) for s in self.steps]

    def hear(self, success: bool, score: float, overlong: str, steps: Sequence[dict[str, Any]]) -> None:
        """The inverse of `told`."""
        self.success, self.score, self.overlong = success, score, overlong
        self.steps = [Step(**s | dict(response=Answer(s["response"], s.pop("logp")))) for s in steps]


Group = list[Episode]                                                   # G rollouts of one task from one initial state
Plan = Sequence[tuple[envs.Task, Sequence[skills.Skill | None]]]        # a group's task, and the skill of each of its rollouts


def fit_prompt(policy: Policy, e: Episode, skill: skills.Skill | None) -> list[int]:
    """The prompt ids of an episode's next step within `max_prompt` tokens: history goes first, then the observation's tail,
    never the skill. UserError if the rest alone is longer."""
    def render(window: int, state: envs.State) -> list[int]:
        # Here the skill enters: as a line of the user turn, in the half of a group that was dealt one.
        return policy.encode(envs.render_prompt(e.task.goal, state, past, skill=skill.text if skill else None,
                                                style=cfg.prompt_style, window=window, world=cfg.env))

    # Every step has a prompt of its own [R]: there is no conversation that grows, so a row is never longer than `max_prompt`.
    cfg, state, past = policy.cfg, e.state, [envs.Turn(s.observation, s.action) for s in e.steps]
    for window in range(min(cfg.history, len(past)), -1, -1):
        ids = render(window, state)
        if len(ids) <= cfg.max_prompt:
            return ids
    keep = len(state.observation)
    while keep and len(ids) > cfg.max_prompt:
        keep //= 2
        ids = render(0, dataclasses.replace(state, observation=state.observation[:keep]))
    if len(ids) > cfg.max_prompt:
        raise UserError(f"--max-prompt {cfg.max_prompt}: too short for the task, the skill and the actions of {e.task.id} "
                        f"({len(ids)} tokens)")
    return ids


def rollout(policy: Policy, env: envs.Environment, plan: Plan, temperature: float, failures: list[str] | None = None,
            dice: int = 0, lengths: Mapping[str, float] | None = None, name: str = "rollout") -> list[Group]:
    """Play every group of the plan: a task, and for each of its rollouts a skill or None. Groups come back in its order.

    `dice` is the number that chance comes from: each token is drawn by (dice, task, rollout, step, position), so an episode is the
    same in whatever batch, and on whatever rank: the ranks of a run play some groups each, so many that all are busy, by `lengths`
    (expected actions of an episode, by kind of task), and tell each other. `policy.tick` hears under `name` how many have ended.
    An environment that raises loses its group: the group comes back empty and the cause is appended to `failures`. An episode that
    reaches a state whose prompt can't be cut to `max_prompt` ends there, unsolved, with `overlong` set. UserError for such a prompt
    of a first step, for a row that doesn't fit into memory, and where the machine fails.
    """
    groups, ranks = [[Episode(task, skill) for skill in dealt] for task, dealt in plan], policy.ranks
    dealt = ranks.deal([(lengths or {}).get(task.kind, env.max_steps) * len(skills) for task, skills in plan])
    lost = play_groups(policy, env, groups, dealt[ranks.rank], temperature, dice, name)
    for told in ranks.others(lambda: [(g, lost.get(g), [e.told() for e in groups[g]]) for g in dealt[ranks.rank]]):
        for g, cause, episodes in told:
            if cause:
                lost[g] = cause
            for e, came_of_it in zip(groups[g], episodes):
                e.hear(*came_of_it)
    if failures is not None:
        failures += [lost[g] for g in sorted(lost)]
    return [[] if g in lost else group for g, group in enumerate(groups)]


def play_groups(policy: Policy, env: envs.Environment, groups: Sequence[Group], own: Sequence[int], temperature: float,
                dice: int, name: str) -> dict[int, str]:
    """Play those of the groups to the end that are this rank's own. Returns which were lost, and why."""
    players = [(g, e) for g, group in enumerate(groups) for e in group]
    playing = Counter(g for g, _ in players)
    streams, rollouts, n_own = [], Counter[str](), sum(playing[g] for g in own)
    for _, e in players:
        rollouts[e.task.id] += 1                    # counted over all groups of the task
        streams.append((e.task.id, rollouts[e.task.id]))

    def ask(i: int) -> Ask:
        """What the policy is asked next in episode i."""
        e = players[i][1]
        return e.prompt, stable_seed(dice, *streams[i], len(e.steps))

    def begin() -> Iterable[tuple[int, Ask]]:
        """The first question of each episode, in turn; all rollouts of a group start in one state, which makes them comparable."""
        for i, (g, e) in enumerate(players):
            if g in own and (start := games.start(g)) is not None:
                e.state = start
                e.prompt = fit_prompt(policy, e, e.skill)
                yield i, ask(i)

    def play_on(i: int, response: list[int]) -> Ask | None:
        """Take the step that the policy answered in episode i; the next question, if it goes on. No episode waits for another."""
        g, e = players[i]
        # What can't be parsed is sent as "", which no world admits: it costs a step, and c of G6 [O].
        text = policy.answer(response)
        action = envs.parse_action(text, getattr(env, "verbatim", False)) or ""
        if (after := games.step(g, e.state, action)) is None:
            return None
        # S9 distils into the prompt that there would have been without the skill: it is kept beside the real one.
        plain = fit_prompt(policy, e, None) if e.skill else None
        e.steps.append(Step(e.prompt, response, text, action, e.state.observation, e.state.anchor, plain,
                            after.observation, after.reward, bool(action) and after.valid))
        e.state, e.success, e.score, e.prompt = after, after.success, after.score, []
        try:
            e.prompt = [] if after.done else fit_prompt(policy, e, e.skill)
        except UserError as error:
            e.overlong = str(error)
        playing[g] -= not e.prompt
        policy.tick(name, n_own - sum(playing[g] for g in own), n_own)
        if e.prompt:
            return ask(i)
        if not playing[g]:
            games.close(g)
        return None

    try:
        with envs.Games(env, [group[0].task for group in groups]) as games:
            policy.converse(begin(), play_on, temperature, policy.cfg.max_response, policy.cfg.groups * policy.cfg.group_size)
    except envs.MachineFault as error:
        raise UserError(str(error)) from error
    return games.lost


# ---- 3. What a rollout was worth: advantages (G1-G6) and effects (S4-S6) ---------------------------------------------

def advantage_unit(cfg: Config, env: envs.Environment) -> float:
    """One standard deviation of returns, in units of advantage.

    The reward is `env.success_reward` for success (10 in both benchmarks: `envs.SUCCESS_REWARD`) and 0 for all else. With
    `norm="std"` its size cancels out. With "mean" (WebShop) advantages are in units of reward: the deviation of returns of
    which half are won is then half the reward. c of G6 and A_max of S8 are in these units, so that neither a norm nor
    another reward changes what they mean (but for `penalty_inside`, whose c is in units of reward). The policy term grows with
    such advantages while L_KL and L_int do not: beta and lambda are for a reward of 10.
    """
    return 1.0 if cfg.norm == "std" else env.success_reward / 2


def assign_advantages(group: Group, cfg: Config, env: envs.Environment) -> None:
    """G1-G6 for one group: sets each step's `advantage`."""
    # Both halves of a pair are one group, so that an anchor state compares a guided action with a plain one [O].
    # The penalty stays outside the normalised returns [O]: inside, as in the release, one bad step of a lost group would weigh
    # as much as the whole group's spread, since nothing else in it differs.
    unit = 1.0 if cfg.penalty_inside else advantage_unit(cfg, env)
    advantages = gigpo.group_advantages(
        [[s.reward for s in e.steps] for e in group], [[s.anchor for s in e.steps] for e in group],
        [[s.valid for s in e.steps] for e in group], gamma=cfg.gamma, omega=cfg.omega, norm=cfg.norm,
        baseline=cfg.baseline, invalid_penalty=cfg.invalid_penalty * unit, penalty_inside=cfg.penalty_inside,
        similarity=cfg.similarity or None)
    for e, row in zip(group, advantages):
        for s, value in zip(e.steps, row):
            s.advantage = float(value)


def record_effects(bank: skills.SkillBank | None, groups: Sequence[Group], iteration: int) -> list[float | None]:
    """S4-S6: each group's paired effect (success scale), entered in the account of its skill, which may be promoted or
    retired by it. None for a group without a skill. Without a bank, effects are entered nowhere (`no_validation`)."""
    effects: list[float | None] = []
    for group in groups:
        skill = next((e.skill for e in group if e.skill), None)         # of the whole guided half: S3 gives a group one
        if skill is None:
            effects.append(None)
            continue
        # Success, not reward: an effect is a difference of success rates, whatever the benchmark pays. One group of 4 + 4
        # says little (its deviation is near .3); the bank shrinks a skill's mean until it has been tried often.
        effect = skills.paired_effect([float(e.success) for e in group if e.skill],
                                      [float(e.success) for e in group if not e.skill])
        if bank is not None:
            bank.record(skill, effect, iteration)
        effects.append(effect)
    return effects


# ---- 4. Rows: what an update learns from -----------------------------------------------------------------------------

@dataclass
class Row:
    """One response under one prompt. RL rows carry an advantage, internalization rows a gate per token (S7) and the
    step's weight (S8).

    A guided rollout of one step that won and a plain one that lost give two RL rows; and the step that the skill led to gives a
    third, under the prompt that has no skill:

    >>> won, lost = (Step([1, 66, 2], [7, 8, 9], "", "", "", "", plain=[1, 2], advantage=1.0),
    ...              Step([1, 2], [7, 5, 9], "", "", "", "", plain=None, advantage=-1.0))
    >>> task, cfg = envs.Task("game", "kind", "put a apple in shelf", "train"), Config()
    >>> bank = make_bank(cfg)
    >>> skill = bank.add("the task needs apple", "look in fridge", born=0, source="game")
    >>> group = [Episode(task, skill, [won], success=True), Episode(task, None, [lost])]
    >>> effect, = record_effects(bank, [group], iteration=1)
    >>> step = GuidedStep(won.plain, won.response, [False, True, False], won.advantage, skill.id, effect)
    >>> for row in (*rl_rows([group]), *internalization_rows([step], bank, cfg)):
    ...     print(row)
    Row(prompt=[1, 66, 2], response=[7, 8, 9], advantage=1.0, gate=[], weight=0.0)
    Row(prompt=[1, 2], response=[7, 5, 9], advantage=-1.0, gate=[], weight=0.0)
    Row(prompt=[1, 2], response=[7, 8, 9], advantage=0.0, gate=[False, True, False], weight=0.5)
    """
    prompt: list[int]
    response: list[int]
    advantage: float = 0.0
    gate: list[bool] = field(default_factory=list)          # empty: an RL row
    weight: float = 0.0
    sampled: list[float] = field(default_factory=list, repr=False)      # log-probabilities that the sampler had, if known
    old: torch.Tensor | None = field(default=None, repr=False)          # those before the update, G7; None: as now
    reference: torch.Tensor | None = field(default=None, repr=False)    # and under the reference, G8; None: no KL term

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class GuidedStep:
    """A step taken with a skill in its prompt, kept as it was until phase 2 decides whether to distil it. (In `distill_plain` a
    step of a plain win.)"""
    prompt: list[int]           # the plain one of the same step, S9
    response: list[int]
    action: list[bool]          # of each response token: does it belong to the action?
    advantage: float            # G6, in standard deviations
    skill: int                  # its place in the bank; -1 without one
    effect: float               # of its pair, S4; 0 without one


def rl_rows(groups: Iterable[Group]) -> list[Row]:
    """Every step of every rollout, guided or plain, under the prompt that it was sampled with."""
    return [Row(s.prompt, s.response, s.advantage, sampled=getattr(s.response, "logp", []))
            for group in groups for e in group for s in e.steps]


def guided_steps(group: Group, effect: float, policy: Policy, unit: float) -> list[GuidedStep]:
    """The steps of a group that had a skill in their prompt, with their action tokens (S7) and the pair's effect (S4).
    `unit` is `advantage_unit`."""
    return [guided_step(s, s.plain or [], policy, unit, e.skill.id, effect) for e in group if e.skill for s in e.steps]


def guided_step(s: Step, prompt: list[int], policy: Policy, unit: float, skill: int = -1, effect: float = 0.0) -> GuidedStep:
    """One step, as it may be distilled into this prompt."""
    # Token by token: a tag may be one token or several, so where the action is must be found in the text.
    action = distill.action_mask([policy.decode([t]) for t in s.response])
    return GuidedStep(prompt, s.response, action, s.advantage / unit, skill, effect)


def internalization_rows(steps: Sequence[GuidedStep], bank: skills.SkillBank, cfg: Config) -> list[Row]:
    """S7-S8: a row for each step, by what is known of its skill *now*, which may be more than when the step was taken.
    Its gate may be shut."""
    if not steps:
        return []
    lengths, variant = [len(s.response) for s in steps], VARIANTS[cfg.variant]

    # Responses of unequal length become a rectangle, whose padding no gate ever opens for.
    def pad(rows: Iterable[list[bool]]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    gate = distill.action_gate(                                                                # (B, T)
        pad(s.action for s in steps), torch.tensor([True] * len(steps)),
        torch.tensor([bank.utility(bank.skills[s.skill]) if s.skill >= 0 else 0.0 for s in steps]),
        torch.tensor([s.effect for s in steps]), response_mask=pad([True] * n for n in lengths),
        tokens=cfg.distill_tokens, require_pair_gain=cfg.pair_gain, gated=variant.gated)
    weight = distill.advantage_weights(torch.tensor([s.advantage for s in steps]), cfg.a_max, uniform=not variant.weighted)   # (B,)
    if cfg.weight_mean == "one":
        weight = distill.with_mean_one(weight, gate)
    return [Row(s.prompt, s.response, gate=is_open[:n].tolist(), weight=w)
            for s, is_open, w, n in zip(steps, gate, weight.tolist(), lengths)]


# ---- 5. Loss and update (S10) ----------------------------------------------------------------------------------------

def step_loss(policy: Policy, rows: Sequence[Row], n_rl: int, n_int: int, lam: float, cfg: Config) -> tuple[torch.Tensor, Counter]:
    """S10: `L = L_GiGPO + beta L_KL + lambda L_int`; the share of a micro-batch of rows, and what is logged of it.

        L_GiGPO = 1/n_rl   sum over RL tokens of              -min(rho A, clip(rho, 1 - eps, 1 + eps) A)             (G7)
        L_KL    = 1/n_rl   sum over RL tokens with A != 0 of   exp(d) - d - 1,  d = log p_ref - log p                 (G8)
        L_int   = 1/n_int  sum over gated tokens of           -w log p(token | plain prompt)                          (S9)

    `n_rl` counts all sampled tokens of the optimizer step, `n_int` all its gated ones, so the gradient does not depend on
    how the step is cut into micro-batches. Rows whose advantage is 0 have no policy gradient; they are not run at all, which
    leaves them out of L_KL, but their tokens count in n_rl. Nor are gated rows with w = 0, which count in n_int [O].
    """
    loss, sums = torch.zeros((), device=policy.device), Counter[str]()
    rl, internal = [r for r in rows if not r.gate], [r for r in rows if r.gate]
    if rl:
        # Only sampled tokens are here, never a prompt's: the mask is by provenance. The stop token was sampled, and counts.
        logp, entropy = policy.logprobs(rl)                                                                  # (N,) each
        advantage = torch.tensor([r.advantage for r in rl for _ in r.response], device=logp.device)          # (N,)
        old = torch.cat([r.old for r in rl]) if rl[0].old is not None else logp.detach()                     # (N,)
        # An advantage belongs to a step, and each token of its response has it in full (G6).
        surrogate = gigpo.clipped_surrogate(logp, old, advantage, clip=cfg.clip, dual_clip=cfg.dual_clip or None).sum()
        kl = torch.zeros_like(surrogate)
        if rl[0].reference is not None:
            kl = gigpo.kl_k3(logp, torch.cat([r.reference for r in rl])).sum()
        loss = (surrogate + cfg.kl_beta * kl) / n_rl
        if rl[0].old is None and all(r.sampled for r in rl):
            sums["sampler_gap"] = (logp.detach().cpu() - torch.tensor([x for r in rl for x in r.sampled])).abs().sum().item()
            sums["compared"] = len(logp)
        clipped = ((logp.detach() - old).exp().sub(1).abs() > cfg.clip).sum()
        sums.update(pg_loss=surrogate.item() / n_rl, kl=kl.item(), entropy=entropy.sum().item(), clipped=clipped.item(),
                    tokens=len(logp))
    if internal:
        # The prompt is the plain one, the response was sampled under a skill: this is where the skill moves into the weights.
        logp, _ = policy.logprobs(internal)                                                                  # (N,)
        gate = torch.tensor([g for r in internal for g in r.gate], device=logp.device)                       # (N,)
        weight = torch.tensor([r.weight for r in internal for _ in r.response], device=logp.device)          # (N,)
        distilled, _ = distill.internalization_loss(logp, weight, gate)
        loss = loss + lam * distilled / n_int
        sums.update(int_loss=distilled.item() / n_int)
    return loss, sums


def update(policy: Policy, optimizer: torch.optim.Optimizer, rl: Sequence[Row], internal: Sequence[Row], lam: float,
           cfg: Config, rng: np.random.Generator, bad: int = 0) -> dict[str, float]:
    """One iteration's optimizer steps. Every RL row counts in exactly one of them, every internalization row in `distill_epochs`.

    `bad` is how many steps in a row had no finite gradient before; BAD_STEPS of them raise UserError. Returns kl and entropy in
    nats per token (of rows with an advantage), sampler_gap (how far the sampler's log-probabilities were from those of the first
    step) and clip_fraction per token, losses and grad_norm (before clipping) as means over the
    steps, and counts. UserError also if a single row doesn't fit into memory.
    """
    n_steps, order = max(1, math.ceil(len(rl) / cfg.minibatch)), np.array([], int)
    if internal:
        n_steps = max(n_steps, math.ceil(len(internal) / cfg.distill_rows) * cfg.distill_epochs)
        order = np.concatenate([rng.permutation(len(internal)) for _ in range(cfg.distill_epochs)])
    # RL rows are spread over as many steps as internalization needs, so that their KL term holds the policy all the while.
    shares = [*zip(np.array_split(rng.permutation(len(rl)), n_steps), np.array_split(order, n_steps))]
    acting = [[rl[i] for i in share if rl[i].advantage != 0.0] for share, _ in shares]
    guided = [[internal[i] for i in share if internal[i].weight > 0] for _, share in shares]
    own = [(policy.ranks.share(a, len), policy.ranks.share(g, len)) for a, g in zip(acting, guided)]        # this rank's
    signal = [r for rows, _ in own for r in rows]
    # In the first step the policy is still the one that sampled: the ratio of G7 is 1, whatever its old log-probabilities.
    later = [r for rows, _ in own[1:] for r in rows]
    sampler = cfg.old == "sampler" and all(r.sampled for r in rl)
    for r, logp in zip(later, (torch.tensor(r.sampled) for r in later) if sampler else policy.frozen_logprobs(later)):
        r.old = logp.to(policy.device)
    if cfg.kl_beta:
        with policy.model.disable_adapter():                                # the reference is the policy without its adapter
            for r, logp in zip(signal, policy.frozen_logprobs(signal)):
                r.reference = logp
    total: Counter = Counter()
    policy.model.train()
    for k, (rl_share, int_share) in enumerate(shares):
        if not (rows := acting[k] + guided[k]):
            continue
        # Denominators are over all rows of the step, those without a gradient and those of other ranks included.
        n_rl = sum(len(rl[i].response) for i in rl_share)
        n_int = max(1, sum(sum(internal[i].gate) for i in int_share))
        loss = partial(step_loss, policy, n_rl=n_rl, n_int=n_int, lam=lam, cfg=cfg)
        sums = policy.descend(optimizer, own[k], loss, cfg.grad_clip)
        total.update(sums, rows=len(rows), row_tokens=sum(map(len, rows)))
        policy.tick("update", k + 1, n_steps)
        bad = bad + 1 if sums["skipped"] else 0
        if bad >= BAD_STEPS:
            raise UserError(f"{BAD_STEPS} updates in a row had a gradient that is not finite (norm {sums['grad_norm']}, losses "
                            f"{sums['pg_loss']:.3g} and {sums['int_loss']:.3g}): resume with a lower --lr and "
                            "--distill-lr, or with --no-4bit")
    policy.model.eval()
    tokens = max(total["tokens"], 1)
    return dict(pg_loss=total["pg_loss"] / n_steps, int_loss=total["int_loss"] / n_steps, kl=total["kl"] / tokens,
                entropy=total["entropy"] / tokens, sampler_gap=total["sampler_gap"] / max(total["compared"], 1),
                clip_fraction=total["clipped"] / tokens,
                grad_norm=total["grad_norm"] / n_steps, optimizer_steps=n_steps, skipped_steps=total["skipped"],
                bad_steps=bad, rows=total["rows"], row_tokens=total["row_tokens"])


# ---- 6. One iteration ------------------------------------------------------------------------------------------------

@dataclass
class Progress:
    """Everything besides weights, optimizer and bank that a resumed run needs. JSON. Every random draw of iteration k
    is seeded by (seed, k), so the iteration number is the state of all random generators."""
    iteration: int = 0
    phase: int = 0
    phase_start: int = 0                                    # iteration in which the phase began
    milestones: int = 0                                     # passed so far: the base's evaluation, and ends of phases
    cursor: int = 0                                         # training tasks drawn so far
    env_steps: int = 0
    train_tokens: int = 0                                   # of rows that went through updates, prompts included
    groups: int = 0
    failed_groups: int = 0
    bad_steps: int = 0                                      # optimizer steps skipped in a row, up to now
    seconds: float = 0.0                                    # training time, evaluations excluded
    solved: list[str] = field(default_factory=list)         # distinct tasks solved without a skill, N_succ
    recent: list[float] = field(default_factory=list)       # plain success of the last iterations
    lengths: dict[str, float] = field(default_factory=dict)             # of late, actions of an episode by kind of task
    wins: list[dict] = field(default_factory=list)          # plain successes not yet mined: task, goal, steps
    guided: list[list[GuidedStep]] = field(default_factory=list)        # of the last iterations
    finished: bool = False


def make_bank(cfg: Config) -> skills.SkillBank:
    """An empty bank with the constants of these settings."""
    return skills.SkillBank(**{name: getattr(cfg, {"max_size": "bank_size"}.get(name, name)) for name in skills.CONSTANTS})


@dataclass
class Learner:
    """All that training reads and changes."""
    cfg: Config
    env: envs.Environment
    policy: Policy
    optimizer: torch.optim.Optimizer
    bank: skills.SkillBank
    progress: Progress

    @classmethod
    def begin(cls, cfg: Config, env: envs.Environment, policy: Policy) -> Learner:
        """Before the first iteration."""
        return cls(cfg, env, policy, make_optimizer(policy), make_bank(cfg),
                   Progress(phase=VARIANTS[cfg.variant].phases[0]))

    @property
    def age(self) -> int:
        """Iterations of the present phase so far."""
        return self.progress.iteration - self.progress.phase_start


# Events: training is a generator of these. When it yields an Iteration, a Milestone or a point of the curve, the learner is whole
# and can be saved.


@dataclass
class Iteration:
    """What an iteration has mined, played and learnt; it fills as it goes on, and is an event when it has ended."""
    number: int
    phase: int
    started: float = field(default_factory=time.perf_counter)
    mined: list[skills.Skill] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)           # those that were played to the end
    failures: list[str] = field(default_factory=list)           # why the others were not
    effects: list[float | None] = field(default_factory=list)   # of each group, S4
    judged: list[skills.Skill] = field(default_factory=list)    # promoted or retired, S6
    rollout_s: float = 0.0                                      # seconds of mining and playing
    update_s: float = 0.0
    stats: dict[str, float] = field(default_factory=dict)       # lambda, internalization rows, and what `update` returns


CURVE = "curve"             # the label of evaluations between two iterations


@dataclass
class Evaluation:
    """A panel has been played."""
    label: str
    episodes: list[Episode]
    failures: list[str]
    seconds: float
    with_skills: bool


@dataclass
class Milestone:
    """Training is about to begin, a phase is about to end (for this reason), or it has ended."""
    reason: str = ""


Events = Generator[Iteration | Evaluation | Milestone, None, Any]


def next_tasks(learner: Learner) -> list[envs.Task]:
    """The next `groups` training tasks: a new seeded permutation of the split for every pass over it."""
    cfg, p, tasks, drawn = learner.cfg, learner.progress, learner.env.tasks("train"), []
    for cursor in range(p.cursor, p.cursor + cfg.groups):
        epoch, at = divmod(cursor, len(tasks))
        order = np.random.default_rng([cfg.seed, 1, epoch]).permutation(len(tasks))
        drawn.append(tasks[int(order[at])])
    p.cursor += cfg.groups
    return drawn


def plain_plan(learner: Learner) -> Plan:
    """Phase 0: every rollout has the plain prompt."""
    return [(task, [None] * learner.cfg.group_size) for task in next_tasks(learner)]


def paired_plan(learner: Learner, explore: bool) -> Plan:
    """S3, S4: the first half of a group's rollouts get its skill, the second half the plain prompt.

    One skill for the whole half: with two, neither could be given the credit. All rollouts of a group start in one state, so
    the halves differ in nothing else. A task that no skill matches is played plain. `explore` (phase 1) lets candidates have
    their turn by the confidence bound; without it only active skills are used.
    """
    cfg, half = learner.cfg, learner.cfg.group_size // 2
    variant = VARIANTS[cfg.variant]
    anyhow = None if variant.matched else np.random.default_rng([cfg.seed, 3, learner.progress.iteration])
    plan = []
    for task in next_tasks(learner):
        # Unvalidated skills have no utility, and stay candidates: the first that fits best is taken, to the end.
        skill = learner.bank.retrieve(task.goal, explore=explore or not variant.validated, shuffle=anyhow)
        plan.append((task, [skill] * half + [None] * (cfg.group_size - half)))
    return plan


def mine(learner: Learner) -> list[skills.Skill]:
    """S1: the current policy reads its own plain wins and writes one skill for each. Returns those that were accepted; the
    others are counted by reason."""
    cfg, p, policy, bank = learner.cfg, learner.progress, learner.policy, learner.bank
    # Each win is read once. No other model ever writes a skill [P], and what is written is judged by pairs alone.
    wins, p.wins, accepted = p.wins, [], []
    # A prompt is cut from the left: of a long story the end is what won.
    prompts = [policy.encode(skills.mining_prompt(w["goal"], w["steps"], cfg.prompt_style,
                                                  max_words=cfg.skill_words))[-4 * cfg.max_prompt:] for w in wins]
    dice = [stable_seed(cfg.seed, "mine", p.iteration, w["task"]) for w in wins]
    for win, ids in zip(wins, policy.generate(prompts, cfg.temperature, max(cfg.max_response // 2, 24), dice)):
        try:
            condition, strategy = skills.parse_skill(policy.answer(ids), max_words=cfg.skill_words)
            accepted.append(bank.add(condition, strategy, p.iteration, win["task"]))
        except skills.SkillRejected as e:
            bank.reject(e.reason)
    return accepted


def play(learner: Learner, it: Iteration, plan: Plan) -> None:
    """Roll the plan out, and find what each rollout was worth: advantages, effects, and what to keep for phase 2."""
    cfg, p, bank, variant = learner.cfg, learner.progress, learner.bank, VARIANTS[learner.cfg.variant]
    dice = stable_seed(cfg.seed, "train", p.iteration)
    for group in rollout(learner.policy, learner.env, plan, cfg.temperature, it.failures, dice, p.lengths):
        # A lost group teaches nothing: its failure was the environment's or max_prompt's, not the policy's.
        if overlong := next((e.overlong for e in group if e.overlong), ""):
            it.failures.append(overlong)
        elif group:
            it.groups.append(group)
    it.rollout_s = time.perf_counter() - it.started
    for group in it.groups:
        assign_advantages(group, cfg, learner.env)
    before = [skill.state for skill in bank.skills]
    it.effects = record_effects(bank if variant.validated else None, it.groups, p.iteration)
    it.judged = [skill for skill, state in zip(bank.skills, before) if skill.state != state]
    # Guided steps are kept from phase 1 on: by phase 2 it is known which of their skills were worth it.
    unit = advantage_unit(cfg, learner.env)
    fresh = [step for group, effect in zip(it.groups, it.effects) if effect is not None
             for step in guided_steps(group, effect, learner.policy, unit)]
    if not variant.guided:
        fresh = [guided_step(s, s.prompt, learner.policy, unit) for group in it.groups for e in group if e.success for s in e.steps]
    p.guided = (p.guided + [fresh])[-cfg.distill_window:]


def gated_rows(learner: Learner) -> tuple[list[Row], float]:
    """What passes the gate of the guided steps that are kept, and lambda (S10). None while too few rows have a weight: a
    few, gone over many times, would ruin the policy."""
    cfg = learner.cfg
    steps = [step for part in learner.progress.guided for step in part]
    rows = [row for row in internalization_rows(steps, learner.bank, cfg) if any(row.gate)]
    if sum(row.weight > 0 for row in rows) < cfg.distill_min:
        return [], 0.0
    # K_warm is counted from the beginning of the phase [O], whether or not there were rows so far.
    return rows, distill.lambda_schedule(learner.age + 1, cfg.lambda_max, cfg.lambda_warm)


def learn(learner: Learner, it: Iteration, internal: Sequence[Row] = (), lam: float = 0.0) -> Iteration:
    """Update on what was played, guided and plain halves alike, and on the internalization rows; end the iteration. UserError
    as `update`."""
    cfg, p, started = learner.cfg, learner.progress, time.perf_counter()
    rl, lr = rl_rows(it.groups), cfg.distill_lr if internal else cfg.lr
    if internal and cfg.distill_decay:
        lr *= 1 - learner.age / phase_limit(cfg, p.phase)
    # One optimizer for all phases, its moments kept; only its rate changes where rows are distilled [O].
    for g in learner.optimizer.param_groups:
        g["lr"] = lr
    it.stats = dict(lam=lam, internal_rows=len(internal), lr=lr) | update(
        learner.policy, learner.optimizer, rl, internal, lam, cfg, np.random.default_rng([cfg.seed, 2, p.iteration]), p.bad_steps)
    p.bad_steps = int(it.stats.pop("bad_steps"))
    it.update_s = time.perf_counter() - started
    p.seconds += it.rollout_s + it.update_s
    p.env_steps += len(rl)
    p.train_tokens += int(it.stats["row_tokens"])
    p.groups += len(it.groups) + len(it.failures)
    p.failed_groups += len(it.failures)
    note_successes(learner, it.groups)
    p.iteration += 1
    return it


def note_successes(learner: Learner, groups: Sequence[Group]) -> None:
    """What later decisions rest on: tasks solved without a skill, recent plain success, wins to mine."""
    cfg, p = learner.cfg, learner.progress
    plain = [e for group in groups for e in group if e.skill is None]
    # The shortest win of a task: its story has the fewest steps that did not matter.
    shortest = {e.task.id: e for e in sorted(plain, key=lambda e: -len(e.steps)) if e.success}
    p.solved += [task for task in shortest if task not in p.solved]
    if plain:                               # an iteration may lose all of its groups
        p.recent = (p.recent + [float(np.mean([e.success for e in plain]))])[-RECENT:]
    for group in groups:
        kind, length = group[0].task.kind, float(np.mean([len(e.steps) for e in group]))
        p.lengths[kind] = (p.lengths.get(kind, length) + length) / 2
    if 1 in VARIANTS[cfg.variant].phases and p.phase < 2:
        p.wins = (p.wins + [dict(task=e.task.id, goal=e.task.goal, steps=[[s.action, s.result] for s in e.steps])
                            for e in shortest.values()])[-cfg.mine_wins:]


# ---- 7. The three phases -----------------------------------------------------------------------------------------------
#
# Each goes on until there is a reason to end it, and returns the reason. A run that was stopped goes on in its phase: all
# that a phase remembers is in `learner.progress` and `learner.bank`.


def warm_up(learner: Learner) -> Events:
    """Phase 0 [P]: GiGPO (G1-G8) on plain prompts, until the policy has wins to learn from: skills that are mined from a
    naive policy are noise. (`gigpo`, the baseline, is this phase for as long as all three would take.)"""
    while not (reason := budget_spent(learner) or enough_solved(learner)):
        yield from curve(learner)
        it = Iteration(learner.progress.iteration, learner.progress.phase)
        play(learner, it, plain_plan(learner))
        yield learn(learner, it)
    return reason


def mine_and_validate(learner: Learner) -> Events:
    """Phase 1 [P]: the policy writes skills from its wins (S1), paired rollouts measure them (S3-S5), and good ones are
    promoted, bad ones retired (S2, S6). It keeps learning by GiGPO from both halves of each group."""
    while not (reason := budget_spent(learner) or enough_active(learner)):
        yield from curve(learner)
        it = Iteration(learner.progress.iteration, learner.progress.phase)
        # Mined first, so that a skill can be tried in the iteration in which it was written.
        if learner.cfg.mine_every and learner.age % learner.cfg.mine_every == 0:
            it.mined = mine(learner)
        play(learner, it, paired_plan(learner, explore=True))
        yield learn(learner, it)
    return reason


def internalize(learner: Learner) -> Events:
    """Phase 2 [P]: as phase 1, with nothing mined; and what a good skill led to is distilled into the plain prompt's policy
    (S7-S10), until the skill is not needed."""
    while not (reason := budget_spent(learner)):
        yield from curve(learner)
        it = Iteration(learner.progress.iteration, learner.progress.phase)
        play(learner, it, paired_plan(learner, explore=False) if VARIANTS[learner.cfg.variant].guided else plain_plan(learner))
        rows, lam = gated_rows(learner)
        yield learn(learner, it, rows, lam)
    return reason


def curve(learner: Learner) -> Events:
    """Before every `eval_every`-th iteration, the plain policy on the first games of the panel. It costs no environment steps, and
    moves no dice of training. (Before and not after, so that a run that was stopped here makes the point when it goes on.)"""
    cfg = learner.cfg
    if cfg.eval_every and learner.progress.iteration % cfg.eval_every == 0:
        yield evaluate(learner.policy, learner.env, panel_tasks(cfg, learner.env)[:cfg.eval_panel], cfg, CURVE)


def phase_limit(cfg: Config, phase: int) -> int:
    """Iterations that a phase may take. A variant that leaves phases out gives theirs to the nearest one that it has, so that
    all variants have the same total."""
    limits, kept = [cfg.warmup_max, cfg.mining_max, cfg.distill_max], VARIANTS[cfg.variant].phases
    return sum(n for k, n in enumerate(limits) if min(kept, key=lambda own: abs(own - k)) == phase)


def budget_spent(learner: Learner) -> str:
    """Why a phase has no iterations left; empty while it has."""
    cfg, p = learner.cfg, learner.progress
    for spent, budget, what in budgets(learner):
        if 0 < budget <= spent:
            return f"the budget of {budget} {what} is spent"
    return f"its budget of {learner.age} iterations is spent" if learner.age >= phase_limit(cfg, p.phase) else ""


def budgets(learner: Learner) -> list[tuple[int, int, str]]:
    """What a run has used, what it may use (0: as much as it takes), and of what."""
    cfg, p = learner.cfg, learner.progress
    return [(p.env_steps, cfg.env_steps, "environment steps"), (p.train_tokens, cfg.train_tokens, "trained tokens")]


def enough_solved(learner: Learner) -> str:
    """Whether phase 1 can begin [P]: by N_succ, distinct tasks solved, and a floor of plain success [O]."""
    cfg, p = learner.cfg, learner.progress
    ready = len(p.solved) >= cfg.n_req and len(p.recent) == RECENT and np.mean(p.recent) >= cfg.floor
    return (f"{len(p.solved)} distinct tasks solved, plain success {np.mean(p.recent):.2f}"
            if ready and 1 in VARIANTS[cfg.variant].phases else "")


def enough_active(learner: Learner) -> str:
    """Whether phase 2 can begin [O]: by the number of active skills."""
    n = len(learner.bank.active)
    return f"{n} active skills" if n >= learner.cfg.active_req else ""


def last_phase(learner: Learner) -> bool:
    """Whether the run ends with the present phase."""
    cfg, p = learner.cfg, learner.progress
    return p.phase >= VARIANTS[cfg.variant].phases[-1] or any(0 < budget <= spent for spent, budget, _ in budgets(learner))


def train(learner: Learner) -> Events:
    """From the first evaluation, or from where a saved run left off, to the end of the last phase. UserError where updates
    keep failing."""
    p, panel = learner.progress, panel_tasks(learner.cfg, learner.env)
    evaluation = partial(evaluate, learner.policy, learner.env, panel, learner.cfg)
    p.finished = p.finished and last_phase(learner) and bool(budget_spent(learner))     # settings may grant a run more
    if not p.milestones:
        if learner.cfg.base_eval:
            yield evaluation("base")
        p.milestones += 1
        yield Milestone()
    while not p.finished:
        reason = yield from (warm_up, mine_and_validate, internalize)[p.phase](learner)
        yield Milestone(reason)
        if last_phase(learner):
            # The bank is thrown away: the policy plays with the plain prompt and nothing else.
            yield evaluation("final")
            p.finished = True
        else:
            # What the weights have learnt by now, and after mining also what the bank would add: the ablation.
            yield evaluation(("after warm-up", "phase 1 plain")[p.phase])
            if p.phase == 1:
                yield evaluation("phase 1 with skills", learner.bank)
            p.phase = next(phase for phase in VARIANTS[learner.cfg.variant].phases if phase > p.phase)
            p.phase_start = p.iteration
        p.milestones += 1
        yield Milestone()


# ---- 8. Evaluation -----------------------------------------------------------------------------------------------------

def panel_tasks(cfg: Config, env: envs.Environment) -> list[envs.Task]:
    """The first `panel` tasks of the split, in its order; 0 means all."""
    tasks = env.tasks(cfg.split)
    return [tasks[i] for i in range(min(cfg.panel or len(tasks), len(tasks)))]


def evaluate(policy: Policy, env: envs.Environment, panel: Sequence[envs.Task], cfg: Config, label: str,
             bank: skills.SkillBank | None = None) -> Evaluation:
    """Play every game of the panel once. Without a bank, the plain prompt and nothing else; the bank is for the ablation.

    The same games and the same dice whatever the checkpoint. A game that its
    environment lost is left out, as it says nothing of the policy; one that ended at a prompt too long for it is not solved.
    UserError as `rollout`, and if too many were lost.
    """
    # One seed for all checkpoints and variants, so that they meet the same dice on the same games: comparisons are paired.
    failures, started, dice = list[str](), time.perf_counter(), stable_seed("evaluate")
    candidates = not VARIANTS[cfg.variant].validated
    plan = [(task, [bank.retrieve(task.goal, explore=candidates) if bank else None]) for task in panel]
    episodes = [e for group in rollout(policy, env, plan, cfg.eval_temperature, failures, dice, name=label) for e in group]
    if too_many_lost(len(failures), len(panel)) or not episodes:
        raise UserError(f"{len(failures)} of the panel's {len(panel)} games were lost (limit {LOST_AT_MOST:.0%}); the last: "
                        f"{failures[-1]}; mend the environment or its data")
    return Evaluation(label, episodes, failures, time.perf_counter() - started, bank is not None)


def too_many_lost(lost: int, of: int) -> bool:
    """Whether what is left would say too little."""
    return lost > LOST_AT_MOST * max(of, 40)


def stable_seed(*parts: Any) -> int:
    """A 63-bit seed from anything printable, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
