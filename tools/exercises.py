"""The exercises of the notebooks, and what is right. Who looks in here before trying spoils the fun.

`check("2.4", answer)` says "right", "wrong" with a hint, or "not yet". What is right is asked of the modules: a number is
computed by them, and code that a reader has written is run beside theirs on random inputs. Solutions, with the reasons, are in
`notebooks/solutions.ipynb`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import distill
import envs
import gigpo
import siri
import skills
from tools.metrics import wilson
from tools.oracle import oracle_walkthrough

TRIALS = 100                # random inputs for code
Rng = np.random.Generator
Solve = Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """`right` gives what is right, from the objects of the notebook (a number), or from each of `inputs` (code)."""
    right: Solve
    hint: str
    within: float = 1e-6
    inputs: Callable[[Rng], tuple] | None = None


EXERCISES: dict[str, Exercise] = {}


def exercise(name: str, hint: str, **more: Any) -> Callable[[Solve], Solve]:
    """Enter a function, which says what is right, as the exercise NOTEBOOK.NUMBER."""
    def enter(right: Solve) -> Solve:
        EXERCISES[name] = Exercise(right, hint, **more)
        return right
    return enter


def check(name: str, answer: Any, *things: Any) -> None:
    """Print whether an answer to the exercise is right, wrong or not there yet. `things` are what the question is about."""
    asked = EXERCISES[name]
    try:
        print(f"{name}:", verdict(asked, answer, things))
    except Exception as error:                      # code of a reader's may raise anything
        print(f"{name}: wrong: it raises {type(error).__name__}: {error}; hint: {asked.hint}")


def verdict(asked: Exercise, answer: Any, things: Sequence[Any]) -> str:
    """The same as a text."""
    rng, wrong = np.random.default_rng(0), f"wrong; hint: {asked.hint}"
    if answer is None or answer is ...:
        return "not yet"
    if asked.inputs is None:
        return "right" if alike(answer, asked.right(*things), asked.within) else wrong
    for _ in range(TRIALS):
        given = asked.inputs(rng)
        said = answer(*copy.deepcopy(given))
        if said is None or said is ...:
            return "not yet"
        if not alike(said, asked.right(*given), asked.within):
            return wrong
    return "right"


def alike(a: Any, b: Any, within: float) -> bool:
    """Whether two numbers, or lists, arrays and tensors of them, differ by `within` at most."""
    a, b = (x.tolist() if isinstance(x, (np.ndarray, np.generic, torch.Tensor)) else x for x in (a, b))
    if isinstance(a, (list, tuple)) or isinstance(b, (list, tuple)):
        both = isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b)
        return both and all(alike(x, y, within) for x, y in zip(a, b))
    return not isinstance(a, str) and abs(a - b) <= within


# ---- 1. The environment ----------------------------------------------------------------------------------------------

@exercise("1.1", "where to search first? the home has habits; and `state.admissible` has the names of all commands", within=0)
def fewest_steps(game: envs.Game) -> int:
    """Those of the oracle, which sees everything."""
    return len(oracle_walkthrough(envs.pddl_game(game.task.data)))


@exercise("1.2", "every sampled token counts, the tags and the closing one included", within=0)
def trained_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text))


@exercise("1.3", "note the observation before each command; is 'Nothing happens.' the start?", within=0)
def anchor_states(game: envs.Game, lines: Sequence[Sequence[str]]) -> int:
    keys = []
    for line in lines:
        states = list(itertools.accumulate(line, game.step, initial=game.start))
        keys.append([state.anchor for state in states[:-1]])
    return 1 + max(int(labels.max()) for labels in gigpo.anchor_groups(keys))


@exercise("1.4", "by provenance: a token that was sampled is trained, also if the same token stands in the prompt",
          inputs=lambda rng: tuple(rng.integers(0, 9, n).tolist() for n in rng.integers(1, 12, 2)))
def provenance(prompt: list[int], response: list[int]) -> list[bool]:
    return [False] * len(prompt) + [True] * len(response)


def some_keys(rng: Rng) -> list[list[str]]:
    """The anchors of a few rollouts."""
    return [rng.choice(["hall", "desk", "shelf", "drawer"], n).tolist() for n in rng.integers(1, 6, rng.integers(1, 5))]


@exercise("1.5", "one numbering for all rollouts of the group, counted in the order in which anchors are first seen",
          inputs=lambda rng: (some_keys(rng),))
def labels(keys: list[list[str]]) -> list[np.ndarray]:
    return gigpo.anchor_groups(keys)


# ---- 2. GiGPO --------------------------------------------------------------------------------------------------------

@exercise("2.1", "the mean is 3.75; the variance is divided by G - 1", within=0.005)
def one_of_three_winners() -> float:
    return gigpo.episode_advantages(np.array([10.0] * 3 + [0.0] * 5), [10] * 8)[0]


@exercise("2.2", "write down the four D, two of which are 0; then normalise them with the unbiased deviation", within=0.005)
def the_quick_one() -> float:
    rewards = [[0, 0, 10], [0, 0, 0, 10], [0, 0], [0, 0]]               # where each visits the state x:
    keys = [["a", "b", "x"], ["x", "c", "d", "e"], ["x", "f"], ["x", "g"]]
    return gigpo.step_advantages(gigpo.step_returns(rewards, 0.95), gigpo.anchor_groups(keys))[0][2]


@exercise("2.3", "which of the two terms does the minimum take there, and does that one depend on rho?", within=0.005)
def slope_of_a_bad_token() -> float:
    logp = torch.tensor([0.5]).log().requires_grad_()
    loss = gigpo.clipped_surrogate(logp, torch.zeros(1), torch.tensor([-2.0]))
    return torch.autograd.grad(loss.sum(), logp)[0].item()


@exercise("2.4", "the unbiased deviation divides by G - 1; a group of one, or one whose returns are equal, has advantages of zero",
          inputs=lambda rng: (rng.choice([0.0, 10.0], rng.integers(1, 9)),))
def advantage(returns: np.ndarray) -> np.ndarray:
    return gigpo.episode_advantages(returns, [1] * len(returns))


@exercise("2.5", "from the last step backwards: what a step gets, and gamma times what the step after it is worth",
          inputs=lambda rng: (rng.choice([0.0, 0.0, 10.0], rng.integers(1, 11)).tolist(), rng.uniform(0.5, 1)))
def discounted(rewards: list[float], gamma: float) -> np.ndarray:
    return gigpo.step_returns([rewards], gamma)[0]


# ---- 3. Skills -------------------------------------------------------------------------------------------------------

@exercise("3.1", "what is the mean, and how much of it is believed after three pairings?", within=0.001)
def believed() -> float:
    return skills.Skill(0, "a", "b", 0, "", effects=[[1, 0.5], [2, 0.0], [3, 0.25]]).utility(kappa=1)


@exercise("3.2", "the variance of one coin is 1/4, that of a mean of 8 an eighth of it; two independent halves add theirs",
          within=0.005)
def spread_of_an_effect() -> float:
    halves = [np.mean(outcomes) for outcomes in itertools.product((0, 1), repeat=8)]        # all 256, equally likely
    return float(np.std([skills.paired_effect([a], [b]) for a in halves for b in halves]))


@exercise("3.3", "N = 6; write down the three utilities, then the three bounds", within=0)
def tried_next(constants: dict[str, float]) -> int:
    bank = skills.SkillBank(**{**constants, "kappa": 1, "ucb_c": 0.3})
    for place, seen in (("cabinet", [0.25] * 2), ("shelf", [0.25] * 4), ("drawer", [])):
        skill = bank.add("the task needs apple", f"look in {place} first", born=0, source="")
        skill.effects = [[k, effect] for k, effect in enumerate(seen)]
    return bank.retrieve("put an apple in fridge").id


def some_group(rng: Rng) -> list[tuple[bool, bool]]:
    """Who of a group had the skill, and who won; both halves have somebody."""
    had = rng.permutation([True, False, *(rng.random(rng.integers(0, 7)) < 0.5)])
    return [(bool(guided), bool(rng.random() < 0.5)) for guided in had]


@exercise("3.4", "the rate of wins among those who had the skill, minus that among those who had not; the halves may be unequal",
          inputs=lambda rng: (some_group(rng),))
def effect(group: list[tuple[bool, bool]]) -> float:
    return skills.paired_effect([won for guided, won in group if guided], [won for guided, won in group if not guided])


@exercise("3.5", "shrink the mean by n / (n + kappa); and a skill that was never paired has utility 0",
          inputs=lambda rng: (rng.uniform(-1, 1, rng.integers(0, 9)).tolist(), rng.uniform(0.5, 6)))
def utility(effects: list[float], kappa: float) -> float:
    return skills.Skill(0, "a", "b", 0, "", effects=[[0, x] for x in effects]).utility(kappa)


# ---- 4. Internalization ----------------------------------------------------------------------------------------------

@exercise("4.1", "what stands between the action tags, and not the tags", within=0)
def gated_tokens(pieces: Sequence[str]) -> int:
    yes = torch.tensor([True])
    return int(distill.action_gate(torch.tensor([distill.action_mask(pieces)]), yes, yes * 0.2, yes * 0.25).sum())


@exercise("4.2", "the second step has weight 0: do its tokens count in the denominator?", within=0.005)
def two_guided_steps() -> float:
    weight = distill.advantage_weights(torch.tensor([[1.0], [-3.0]]), a_max=2.0)
    total, count = distill.internalization_loss(torch.tensor([[0.5, 0.25], [0.9, 0.9]]).log(), weight, torch.ones(2, 2).bool())
    return float(total / count)


@exercise("4.3", "write lambda(k) as a formula in k and solve for k; k is a whole number", within=0)
def first_above_half() -> int:
    return next(k for k in itertools.count() if distill.lambda_schedule(k, 0.8, 5) > 0.5)


def some_step(rng: Rng) -> tuple:
    """A step's tokens, whether it had a skill, that skill's utility, the pair's effect; zero is among them."""
    utility, delta = rng.choice([-0.25, 0.0, 0.25, 0.5], 2).tolist()
    return (rng.random(rng.integers(1, 9)) < 0.5).tolist(), bool(rng.random() < 0.8), utility, delta


@exercise("4.4", "all four conditions hold, or the gate is shut; a utility or an effect of exactly 0 is not above 0",
          inputs=some_step)
def gate(is_action: list[bool], used_skill: bool, utility: float, delta: float) -> list[bool]:
    row = (torch.tensor([x]) for x in (used_skill, utility, delta))
    return distill.action_gate(torch.tensor([is_action]), *row)[0].tolist()


def some_rows(rng: Rng) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities (B, T), weights (B, 1), and a gate (B, T) that is open somewhere."""
    shape = tuple(rng.integers(1, 5, 2))
    is_open = rng.random(shape) < 0.6
    is_open[0, 0] = True
    return torch.tensor(-rng.random(shape)), torch.tensor(rng.choice([0.0, 0.5, 1.0], (shape[0], 1))), torch.tensor(is_open)


@exercise("4.5", "sum over the gated tokens only; divide by their number, those of weight 0 included; mind the sign",
          inputs=some_rows)
def loss(logp: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor) -> float:
    total, count = distill.internalization_loss(logp, weight, gate)
    return (total / count).item()


# ---- 5. A whole run --------------------------------------------------------------------------------------------------

@exercise("5.1", "sqrt(p (1 - p) / n), with success_skill and n_skill of the last row of phase 1", within=0.0006)
def last_of_mining(m: dict[str, np.ndarray]) -> float:
    last = np.flatnonzero(m["phase"] == 1)[-1]
    return math.sqrt(m["success_skill"][last] * (1 - m["success_skill"][last]) / m["n_skill"][last])


@exercise("5.2", "every skill keeps its list of effects; count them", within=0)
def pairings(bank: skills.SkillBank) -> int:
    return sum(skill.n for skill in bank.skills)


@exercise("5.3", "wilson takes the number of successes and n", within=0.005)
def twelve_games_fewer(results: Sequence[dict[str, Any]]) -> float:
    return wilson(results[-1]["successes"] - 12, results[-1]["n"])[0]


# ---- 6. The paper's setting, and an environment of your own ----------------------------------------------------------

@exercise("6.1", "bytes of keys and values for each token of the row; a MiB is 2**20 bytes", within=0.5)
def cache_of_a_row(kv: int, cfg: siri.Config) -> float:
    return kv * (cfg.max_prompt + cfg.max_response) / 2**20


@exercise("6.2", "two of six places, and the order does not matter", within=0.005)
def lucky_find(game: envs.Game) -> float:
    orders = list(itertools.permutations(game.start.admissible, 2))
    firsts = [(game.step(game.start, first), second) for first, second in orders]
    return sum(state.success or game.step(state, second).success for state, second in firsts) / len(orders)


@exercise("6.3", "the anchor is the observation; does 'you see nothing .' tell one place from another?", within=0)
def states_of_the_room(game: envs.Game) -> int:
    wrong = [action for action in game.start.admissible if not game.step(game.start, action).success]
    starts = [[game.start.anchor]] * 2 + [[game.start.anchor, game.step(game.start, action).anchor] for action in wrong[:2]]
    return 1 + max(int(labels.max()) for labels in gigpo.anchor_groups(starts))
