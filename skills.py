"""Skills: one-line pieces of advice that the policy mines from its own successes, and the bank that tests them.

SIRI (arXiv 2606.02355), phase 1. Equations, by tag:

    S1  mining       response -> (condition, strategy), or a rejection that is counted
    S3  retrieval    argmax over the k best-matching skills of  U_s + c sqrt(log(1 + N) / (1 + n_s))
    S4  effect       Delta_g = mean R^skill - mean R^plain, within one group, on the success scale
    S5  utility      U_s = n / (n + kappa) * mean_g Delta_g,  and its standard error;  or  U_s <- (1 - b) U_s + b Delta_g
    S6  lifecycle    candidate -> active if U_s > tau_up;  -> retired if U_s < tau_down, m_retire times in a row

The paper states the stages and both thresholds' rules. Ours, because it leaves them open: the constants; the reasons
to reject a skill; TF-IDF matching and the confidence bound, so that untried candidates get their turn; the shrinkage
(one group of 4 + 4 rollouts has a standard deviation near 0.32, so a young mean says little); one skill per group,
since two would share the credit. Retirement is final, and a retired skill still blocks its duplicates.

Read in this order: what a skill is, how one is written (S1), how one is found for a task (S3), what it is worth in a group
(S4), the bank that keeps account and passes judgement (S2, S5, S6), and how its file is checked. The constants are
settings of a run and have their values, and why, in `siri.Config`.

>>> bank = SkillBank(kappa=5, tau_up=0.1, tau_down=0, n_eval=2, m_retire=5, top_k=4, ucb_c=0.3, min_similarity=0.05,
...                  max_size=64)
>>> condition, strategy = parse_skill("<skill>When the task needs apple -> look in fridge</skill>")
>>> skill = bank.add(condition, strategy, born=3, source="game 17")
>>> bank.retrieve("put a clean apple in sinkbasin.").text
'when the task needs apple -> look in fridge'
>>> for iteration in (4, 5):
...     state = bank.record(skill, paired_effect([1, 1, 1, 0], [1, 0, 0, 0]), iteration)
>>> state, round(skill.utility(bank.kappa), 3)                                         # 2 / (2 + 5) * 0.5
('active', 0.143)
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

STATES = ("candidate", "active", "retired")
REASONS = ("unparsable", "control_token", "empty", "instance_specific", "too_long", "duplicate", "bank_full")
MAX_WORDS = 40          # words in one skill, both halves together
MAX_WORD_CHARS = 10     # mean characters a word, so that text written without spaces is bounded too
OBSERVATION_CHARS = 200 # of each observation shown in the full mining prompt
DIGITS = re.compile(r"\b([^\W\d_]+)\d+(?:[.,]\d+)*\b|\s*[#$]?\b\d+(?:[.,]\d+)*\b%?")      # apple2; and alone: 2, #3, $9.50

# The prompt's form and its example. The example is about neither benchmark: the policy must find its skills itself.
FORM = ("CONDITION", "STRATEGY")
EXAMPLE = ("a door is locked", "look for its key nearby before trying other rooms")

STOP_WORDS = frozenset(
    "an and any are as at be by can do for from goal has have if in into is it its me must my need needed needs of on "
    "or should some task tasks that the them then there they this to want wants was when while will with you your"
    .split())


# ---- 1. Types (S2) ----

class SkillRejected(Exception):
    """A mined skill that must not enter the bank; `reason` is one of REASONS."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Skill:
    """S2: one skill and the whole history of its paired effects.

    Effects, `mean`, `utility` and `stderr` are on the success scale: differences of success rates, -1..1.
    """

    id: int                                      # its index in the bank
    condition: str                               # when it applies; retrieval reads only this half
    strategy: str                                # what to do then
    born: int                                    # iteration in which it was mined
    source: str                                  # id of the task whose trajectory it was mined from
    state: str = "candidate"                     # one of STATES
    effects: list = field(default_factory=list)  # [iteration, Delta_g] for each pairing, in order
    low_streak: int = 0                          # evaluations in a row with U_s < tau_down

    @property
    def text(self) -> str:
        """The one line that the policy reads."""
        return f"when {self.condition} -> {self.strategy}"

    @property
    def n(self) -> int:
        """Number of pairings."""
        return len(self.effects)

    @property
    def mean(self) -> float:
        """Mean of Delta_g over the pairings; 0 before the first."""
        return float(np.mean([delta for _, delta in self.effects])) if self.n else 0.0

    def utility(self, kappa: float, ema: float = 0.0) -> float:
        """S5: U_s = n / (n + kappa) * mean_g Delta_g, as if kappa more pairings had shown no effect; 0 for n = 0.

        With `ema` = b above 0, the moving average U_s <- (1 - b) U_s + b Delta_g from 0, which forgets early pairings; kappa
        has no part in it.
        """
        if ema:
            return float(sum(ema * (1 - ema) ** age * delta for age, (_, delta) in enumerate(reversed(self.effects))))
        return self.n / (self.n + kappa) * self.mean if self.n else 0.0

    def stderr(self, kappa: float, ema: float = 0.0) -> float | None:
        """S5: n / (n + kappa) * sd / sqrt(n), sd the unbiased standard deviation of Delta_g; None for n < 2. Of a moving average,
        sd times the norm of its weights."""
        if self.n < 2:
            return None
        sd = np.std([delta for _, delta in self.effects], ddof=1)
        if ema:
            return float(sd * math.sqrt(sum((ema * (1 - ema) ** age) ** 2 for age in range(self.n))))
        return float(self.n / (self.n + kappa) * sd / math.sqrt(self.n))

    def to_dict(self, kappa: float, ema: float = 0.0) -> dict:
        """A JSON object; `n`, `utility` and `stderr` are there for the reader and are recomputed, never read back."""
        return {"id": self.id, "condition": self.condition, "strategy": self.strategy, "state": self.state,
                "born": self.born, "source": self.source, "n": self.n, "utility": self.utility(kappa, ema),
                "stderr": self.stderr(kappa, ema), "effects": [list(e) for e in self.effects],
                "low_streak": self.low_streak}


# ---- 2. Mining (S1) ----

def kinds(text: str) -> str:
    """The text without numbers, since a thing with a number is in one game only. A code such as b00x2 stays as it is.

    >>> kinds("take apple 2 from  drawer 1")
    'take apple from drawer'
    """
    return " ".join(DIGITS.sub(r"\1", text).split())


def mining_prompt(goal: str, steps: Sequence[tuple[str, str]], style: str = "full", *,
                  max_words: int = MAX_WORDS) -> str:
    """S1: the user turn that shows the policy its own successful plain trajectory and asks for one skill.

    `steps` holds (action, the observation that followed). "full" is for an instruct model: things are named by their
    `kinds`, and observations are cut to OBSERVATION_CHARS. "compact" is for a tiny word-level policy: few fixed words, and
    the actions only.
    The wording is ours. Raises ValueError for a trajectory without steps or an unknown style.
    """
    if not steps:
        raise ValueError("steps is empty: a skill is mined from a trajectory with at least one action")
    if style == "compact":
        return f"task: {goal}\nactions: {' ; '.join(action for action, _ in steps)}\nwrite a skill"
    if style != "full":
        raise ValueError(f"style is {style!r}, expected 'full' or 'compact'")
    shorten = lambda text: textwrap.shorten(kinds(text), OBSERVATION_CHARS, placeholder=" ...")
    shown = "\n".join(f"> {kinds(action)}\n{shorten(observation)}" for action, observation in steps)
    form, example = ("<skill>when {} -> {}</skill>".format(*halves) for halves in (FORM, EXAMPLE))
    return (f"You have just completed this task: {kinds(goal)}\n\n"
            f"What you did (after >) and what you saw:\n{shown}\n\n"
            "Write down the one lesson from this success that would help you most with similar tasks.\n"
            "- CONDITION tells which tasks it is for, in the words such a task would use.\n"
            "- STRATEGY tells what to do, briefly enough to follow at a glance.\n"
            f"- Keep it general: kinds of things and places, never a particular one, no digits, at most {max_words} words.\n"
            "Your reply MUST be one line in exactly this form, with the word when, the arrow and both tags, and nothing else:\n"
            f"{form}\nFor example, about another world:\n{example}")


def parse_skill(response: str, *, max_words: int = MAX_WORDS) -> tuple[str, str]:
    """S1: (condition, strategy) from a response holding exactly one `<skill>when CONDITION -> STRATEGY</skill>`.

    Text around the tags is ignored, white space becomes single spaces, letter case is kept, and a leading "when" or
    "do" is dropped (not that of "do not"): parsing a skill's own text gives that skill again. Raises SkillRejected:

        unparsable         not one pair of tags, or not one arrow
        control_token      an angle bracket besides the arrow's (<|, |>, any tag), or an unprintable character
        empty              a half without a letter, or an echo of the prompt's form or example
        instance_specific  a digit that is no number: a code exists in one game only. Numbers are dropped
        too_long           over max_words words, or over MAX_WORD_CHARS * max_words characters

    >>> parse_skill("So: <skill> When it is dark ->  do  find a lamp </skill>")
    ('it is dark', 'find a lamp')
    """
    found = re.findall(r"<skill>(.*?)</skill>", response, re.IGNORECASE | re.DOTALL)
    if len(found) != 1:
        raise SkillRejected("unparsable")
    body = kinds(found[0])
    if not body.isprintable() or re.search(r"<|(?<!-)>", body):
        raise SkillRejected("control_token")
    halves = [half.strip() for half in re.split(r"-+>", body)]
    if len(halves) != 2:
        raise SkillRejected("unparsable")
    condition = re.sub(r"^(when( |$))+", "", halves[0], flags=re.IGNORECASE)
    strategy = re.sub(r"^(do( (?!not\b)|$))+", "", halves[1], flags=re.IGNORECASE)
    skill = (condition, strategy)
    if not all(any(map(str.isalpha, half)) for half in skill) or skill in (FORM, EXAMPLE):
        raise SkillRejected("empty")
    text = f"{condition} {strategy}"
    if any(map(str.isdigit, text)):
        raise SkillRejected("instance_specific")
    if len(text.split()) > max_words or len(text) > MAX_WORD_CHARS * max_words:
        raise SkillRejected("too_long")
    return skill


# ---- 3. Retrieval (S3) ----

def words(text: str) -> list[str]:
    """S3: the content words of a text: whole runs of two or more letters, case folded; no numbers, no stop words.

    >>> words("Put that hat in drawer 2.")
    ['put', 'hat', 'drawer']
    """
    return [word for word in re.findall(r"[^\W\d_]{2,}", text.casefold()) if word not in STOP_WORDS]


def tfidf_cosine(query: str, documents: Sequence[str]) -> np.ndarray:
    """S3: cosine similarity of the query with each of D documents, shape (D,), each in [0, 1]; 0 if no word is shared.

    A text's weight for word w is count(w) * idf(w), with the smooth idf(w) = 1 + ln((1 + D) / (1 + df(w))), where df(w)
    is the number of documents that hold w. Query words that no document holds stay in the query's norm: the similarity
    then says how much of the task a skill speaks about.
    """
    counts = [Counter(words(text)) for text in (query, *documents)]
    vocabulary = sorted(set().union(*counts))
    tf = np.array([[count[w] for w in vocabulary] for count in counts], dtype=float)  # (1 + D, V)
    df = (tf[1:] > 0).sum(axis=0)                                                     # (V,)
    x = tf * (1 + np.log((1 + len(documents)) / (1 + df)))                            # (1 + D, V)
    norm = np.linalg.norm(x, axis=1, keepdims=True)                                   # (1 + D, 1)
    x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)                      # (1 + D, V)
    return np.minimum((x[1:] * x[0]).sum(axis=1), 1.0)  # (D,); not `@`, whose rounding could untie equal documents


# ---- 4. Paired effect (S4) ----

def paired_effect(skill_outcomes: Sequence[float], plain_outcomes: Sequence[float]) -> float:
    """S4: Delta_g = mean R^skill - mean R^plain over one group's two halves, success scale (0 lost, 1 won).

    Raises ValueError for an empty half or an outcome outside 0..1 (a return of 10 is on another scale).
    """
    for name, half in (("skill_outcomes", skill_outcomes), ("plain_outcomes", plain_outcomes)):
        if len(half) == 0:
            raise ValueError(f"{name} is empty: an effect needs rollouts in both halves")
        if not all(0 <= outcome <= 1 for outcome in half):
            raise ValueError(f"{name} is {list(half)}, expected outcomes in 0..1")
    return float(np.mean(skill_outcomes) - np.mean(plain_outcomes))


# ---- 5. The bank (S2, S3, S5, S6) ----

@dataclass
class SkillBank:
    """S2: every skill ever accepted, retired ones included (skills[i].id == i), and the counts of rejections.

    A constant that is malformed, or tau_down above tau_up, raises ValueError naming it.
    """

    kappa: float            # S5: weight of the prior at zero effect, pairings
    tau_up: float           # S6: promote above this utility
    tau_down: float         # S6: an evaluation below this utility is a low one
    n_eval: int             # S6: pairings before the first evaluation; each later pairing is another one
    m_retire: int           # S6: low evaluations in a row that retire a skill
    top_k: int              # S3: best-matching skills among which the bound chooses
    ucb_c: float            # S3: weight of the exploration bonus, success scale
    min_similarity: float   # S3: a skill matches above this cosine
    max_size: int           # candidates and active skills together
    ema: float = 0.0        # S5: b of a moving average of effects; 0: their mean, shrunk by kappa
    skills: list[Skill] = field(default_factory=list)
    rejected: Counter = field(default_factory=Counter)

    def __post_init__(self):
        if problem := misfit(self.constants(), CONSTANTS, "bank"):
            raise ValueError(problem)
        if self.tau_down > self.tau_up:
            raise ValueError(f"bank.tau_down is {self.tau_down}, expected at most tau_up = {self.tau_up}")

    def constants(self) -> dict[str, float]:
        """All that was set, and never changes."""
        return {name: getattr(self, name) for name in CONSTANTS}

    def utility(self, skill: Skill) -> float:
        """S5, success scale."""
        return skill.utility(self.kappa, self.ema)

    def stderr(self, skill: Skill) -> float | None:
        """S5: the standard error of the utility."""
        return skill.stderr(self.kappa, self.ema)

    @property
    def live(self) -> list[Skill]:
        """Candidates and active skills."""
        return [skill for skill in self.skills if skill.state != "retired"]

    @property
    def active(self) -> list[Skill]:
        return [skill for skill in self.skills if skill.state == "active"]

    def counts(self) -> dict[str, int]:
        """Number of skills in each of STATES."""
        return {state: sum(skill.state == state for skill in self.skills) for state in STATES}

    def add(self, condition: str, strategy: str, born: int, source: str) -> Skill:
        """S2: a new candidate from `parse_skill`'s halves.

        Raises SkillRejected("duplicate") if any skill, retired or not, has the same text up to letter case, and
        SkillRejected("bank_full") if max_size skills are live. The caller counts both with `reject`.
        """
        skill = Skill(len(self.skills), condition, strategy, born, source)
        if any(skill.text.casefold() == other.text.casefold() for other in self.skills):
            raise SkillRejected("duplicate")
        if len(self.live) >= self.max_size:
            raise SkillRejected("bank_full")
        self.skills.append(skill)
        return skill

    def reject(self, reason: str) -> None:
        """S1: counts one rejected skill. Raises ValueError for a reason not in REASONS."""
        if reason not in REASONS:
            raise ValueError(f"reason is {reason!r}, expected one of {', '.join(REASONS)}")
        self.rejected[reason] += 1

    def retrieve(self, task_text: str, *, explore: bool = True,
                 shuffle: np.random.Generator | None = None) -> Skill | None:
        """S3: the one skill for this task's group, or None if none matches.

        explore=True: of the top_k live skills by similarity (above min_similarity), the largest
        U_s + c sqrt(log(1 + N) / (1 + n_s)), N the pairings of those k together; ties go to the more similar, then the
        older. explore=False (evaluation): the most similar active skill; ties go to the more useful, then the older.
        shuffle: a uniform draw from the same pool whatever the task, for the ablation `random_skill`.
        """
        pool = self.live if explore else self.active
        if shuffle is not None:
            return pool[shuffle.integers(len(pool))] if pool else None
        similarity = tfidf_cosine(task_text, [skill.condition for skill in pool])
        matches = [(sim, skill) for sim, skill in zip(similarity, pool) if sim > self.min_similarity]
        if not explore:
            rank = lambda m: (m[0], self.utility(m[1]), -m[1].id)
        else:
            matches = sorted(matches, key=lambda m: (-m[0], m[1].id))[:self.top_k]
            log_total = math.log(1 + sum(skill.n for _, skill in matches))
            bound = lambda skill: self.utility(skill) + self.ucb_c * math.sqrt(log_total / (1 + skill.n))
            rank = lambda m: (bound(m[1]), m[0], -m[1].id)
        return max(matches, key=rank)[1] if matches else None

    def record(self, skill: Skill, delta: float, iteration: int) -> str:
        """S5-S6: adds one paired effect Delta_g, moves the skill through its lifecycle, and returns its state.

        From the n_eval-th pairing on: U_s > tau_up makes it active, where it stays while U_s is between the thresholds;
        m_retire evaluations in a row with U_s < tau_down retire it, for good (effects that arrive later are only kept).
        Raises ValueError for a skill of another bank or an effect that is not an [iteration >= 0, -1..1] pair.
        """
        if not any(skill is own for own in self.skills):
            raise ValueError(f"skill {skill.id} is not an object of this bank")
        if problem := misfit([iteration, delta], EFFECT, f"skill {skill.id}: effect"):
            raise ValueError(problem)
        skill.effects.append([iteration, float(delta)])
        if skill.state != "retired" and skill.n >= self.n_eval:
            utility = self.utility(skill)
            skill.low_streak = skill.low_streak + 1 if utility < self.tau_down else 0
            if utility > self.tau_up:
                skill.state = "active"
            elif skill.low_streak >= self.m_retire:
                skill.state = "retired"
        return skill.state

    def to_json(self) -> dict:
        """The whole bank as a JSON object: the constants, the rejections, the skills."""
        return {**self.constants(), "rejected": dict(self.rejected),
                "skills": [s.to_dict(self.kappa, self.ema) for s in self.skills]}

    @classmethod
    def from_json(cls, data: Any) -> SkillBank:
        """The exact inverse of `to_json`. Raises ValueError naming what is malformed."""
        if problem := misfit(data, BANK, "bank"):
            raise ValueError(problem)
        known = [f.name for f in fields(Skill)]         # n, utility and stderr are there for the reader, and made anew
        skills = [Skill(**{**{name: item[name] for name in known}, "effects": [list(e) for e in item["effects"]]})
                  for item in data["skills"]]
        for index, skill in enumerate(skills):
            if skill.id != index:
                raise ValueError(f"bank.skills[{index}].id is {skill.id}, expected {index}, its place in the bank")
        return cls(**{**data, "skills": skills, "rejected": Counter(data["rejected"])})


# ---- 6. What JSON data must be ----
#
# One checker for all that a run reads back: the bank here, settings, progress, evaluations and samples where they are used.


EXACT = 2**53               # from here on whole numbers are not exact as a float


class Form(NamedTuple):
    """What a value must be: a predicate, and the same in words."""
    holds: Callable[[Any], bool]
    words: str

    def problem(self, value: Any) -> str:
        """What the value would have to be; empty if it is that."""
        huge = isinstance(value, (int, float)) and not abs(value) < EXACT
        return "" if self.holds(value) else self.words + " below 9e15 in size" * huge


class Optional(NamedTuple):
    """The form of a key that may be missing."""
    form: Any


def misfit(value: Any, form: Any, name: str) -> str:
    """What is wrong with JSON data, as "name is VALUE, expected ..."; empty if it fits the form.

    A form is a Form, [form of every item], {key: form} with all of its keys and no others (an Optional's may be missing), or
    {..., ...: form} where the last is for every other key.

    >>> misfit({"n": [1, -1]}, {"n": [COUNT]}, "file")
    'file.n[1] is -1, expected a whole number >= 0'
    """
    if isinstance(form, Optional):
        return misfit(value, form.form, name)
    whole = form if isinstance(form, Form) else LIST if isinstance(form, list) else OBJECT
    if problem := whole.problem(value):
        return f"{name} is {repr(value)[:60]}, expected {problem}"
    if whole is form:
        return ""
    if whole is LIST:
        parts = ((item, form[0], f"{name}[{i}]") for i, item in enumerate(value))
    else:
        needed = [k for k in form if k is not ... and not isinstance(form[k], Optional)]
        if wrong := [k for k in needed if k not in value] + [k for k in value if k not in form and ... not in form]:
            return f"{name}: {str(wrong[0])[:60]} is {'unknown' if wrong[0] in value else 'missing'}"
        parts = ((item, form.get(key, form.get(...)), f"{name}.{str(key)[:60]}") for key, item in value.items())
    return next(filter(None, (misfit(*part) for part in parts)), "")


def number(least: float = -math.inf, *, above: float = -math.inf, most: float = math.inf) -> Form:
    """A finite number within bounds, and below EXACT in size."""
    words = [f" {sign} {x:g}" for sign, x in ((">=", least), (">", above), ("<=", most)) if math.isfinite(x)]
    return Form(lambda x: type(x) in (int, float) and -EXACT < x < EXACT and least <= x <= most and x > above,
                "a finite number" + " and".join(words))


def count(least: int = 0) -> Form:
    """A whole number from `least` on, below EXACT."""
    return Form(lambda x: type(x) is int and least <= x < EXACT, f"a whole number >= {least}")


def choice(names: Sequence[str]) -> Form:
    """One of some texts."""
    return Form(lambda x: x in names, f"one of {', '.join(names)}")


COUNT, NUMBER = count(), number()
LIST, OBJECT = Form(lambda x: isinstance(x, list), "a list"), Form(lambda x: isinstance(x, dict), "an object")
FLAG = Form(lambda x: type(x) is bool, "true or false")
TEXT = Form(lambda x: isinstance(x, str), "a text")
PHRASE = Form(lambda x: isinstance(x, str) and bool(x.strip()), "a text that is not blank")
ANYTHING = Form(lambda x: True, "anything")
EFFECT = Form(lambda x: isinstance(x, list) and len(x) == 2 and COUNT.holds(x[0]) and NUMBER.holds(x[1]) and abs(x[1]) <= 1,
              "a pair [iteration >= 0, effect in -1..1]")
CONSTANTS = dict(kappa=number(0), tau_up=NUMBER, tau_down=NUMBER, n_eval=count(1), m_retire=count(1), top_k=count(1),
                 ucb_c=number(0), min_similarity=number(0), max_size=count(1), ema=Optional(number(0, most=1)))
SKILL = {"id": COUNT, "condition": PHRASE, "strategy": PHRASE, "born": COUNT, "source": TEXT,
         "state": choice(STATES), "effects": [EFFECT], "low_streak": COUNT,
         ...: ANYTHING}
REJECTED = Form(lambda x: isinstance(x, dict) and set(x) <= set(REASONS) and all(map(COUNT.holds, x.values())),
                f"a count for each of {', '.join(REASONS)}")
BANK = CONSTANTS | {"rejected": REJECTED, "skills": [SKILL]}
