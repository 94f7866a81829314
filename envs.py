"""Environments: text tasks that a policy plays, a state in and a state out. ALFWorld: sections 3-8; WebShop: 9-12.

An environment is a set of *tasks* and a way to play them. Playing is functional: `game.step(state, action)`
returns a new `State` and never changes the old one, so the rollouts of a group share one engine, start in the
same state by construction, and can be replayed or branched at will.

>>> world = make("alfworld", compact=True)
>>> with world.open(world.tasks("train")[0]) as game:
...     game.step(game.start, "fly away").observation
'Nothing happens.'
"""

from __future__ import annotations

import ast
import errno
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache, lru_cache
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import regex

from tools.limits import within

# ---- 1. The protocol ---------------------------------------------------------------------------------------

# [R] What success pays in both benchmarks; all else pays 0, invalid actions too (their cost is c of G6, see `siri.Config`).
# With `norm="std"` another figure changes nothing but the returns that are logged; with "mean" advantages grow with it, and
# whatever is measured in advantages grows along (`siri.advantage_unit`).
SUCCESS_REWARD = 10.0


@dataclass(frozen=True)
class Task:
    """One game or shopping goal. `id` is unique and stable, `kind` the task type that results are grouped by."""
    id: str
    kind: str
    goal: str                       # the sentence that the policy is given
    split: str                      # "train", "valid_seen" or "valid_unseen"; WebShop: "train", "validation" or "test"
    data: Any = field(default=None, repr=False, compare=False)   # what the environment needs to open it


@dataclass(frozen=True)
class State:
    """What a rollout is in after `steps` actions. Immutable; `engine` belongs to the environment.

    Both benchmarks give SUCCESS_REWARD for the action that succeeds and 0 for any other, as the GiGPO release does.
    """
    observation: str                # text shown to the policy
    admissible: tuple[str, ...]     # commands that the environment accepts now
    anchor: str                     # equal anchors are the same anchor state (G3)
    reward: float = 0.0             # reward of the action that led here
    done: bool = False
    success: bool = False
    steps: int = 0                  # actions taken so far
    valid: bool = True              # the action that led here was admitted
    score: float = 0.0              # how well the task was met, 0..1; 1 is success
    engine: Any = field(default=None, repr=False, compare=False)


class MachineFault(Exception):
    """Not the policy failed, nor the game: the machine did, and would again. The message says how to mend it."""


class Game(Protocol):
    """One task, opened. All rollouts of a group play the same `Game`: `step` returns the state after an action, and
    leaves the old one as it was."""
    task: Task
    start: State

    def step(self, state: State, action: str) -> State: ...
    def close(self) -> None: ...


class Environment(Protocol):
    """A benchmark: tasks by split, and games to play them in. An episode ends after `max_steps` actions.

    `open` and `step` may raise anything: the group, or in an evaluation the game, is then left out. MachineFault ends the run.
    """
    name: str
    scored: bool                    # whether a task has a score besides success
    success_reward: float           # what the action that succeeds pays: the scale of all returns
    max_steps: int
    notice: str                     # the first line of output: which data this is

    def tasks(self, split: str) -> Sequence[Task]: ...
    def open(self, task: Task) -> Game: ...


class Games:
    """The games of a rollout's groups, by number; each is opened when it is first asked for. A group whose environment raises, or
    pays what is no finite number, is `lost`, which says why: `start` and `step` give None from then on. Raises MachineFault, which
    would lose every other group, too."""

    def __init__(self, env: Environment, tasks: Sequence[Task]) -> None:
        self.env, self.tasks = env, tasks
        self.games, self.lost = dict[int, Game](), dict[int, str]()

    def __enter__(self) -> Games:
        return self

    def __exit__(self, *_: object) -> None:
        for g in [*self.games]:
            self.close(g)

    def close(self, g: int) -> None:
        """Game `g` is over, or given up."""
        if g in self.games:
            self.games.pop(g).close()

    def lose(self, g: int, error: Exception) -> None:
        """Give a group up."""
        if isinstance(error, MachineFault):
            raise error
        self.lost[g] = f"{self.tasks[g].id}: {type(error).__name__}: {' '.join(str(error).split())}"
        self.close(g)

    def start(self, g: int) -> State | None:
        """The state in which all rollouts of group `g` begin."""
        try:
            if g not in self.games and g not in self.lost:
                self.games[g] = self.env.open(self.tasks[g])
        except Exception as error:                  # an environment may raise anything; the group is lost, the run is not
            self.lose(g, error)
        return None if g in self.lost else self.games[g].start

    def step(self, g: int, state: State, action: str) -> State | None:
        """The state after an action in game `g`."""
        if g in self.lost:
            return None
        try:
            after = self.games[g].step(state, action)
            if not math.isfinite(after.reward):
                raise ValueError(f"its reward is {after.reward}")
            return after
        except Exception as error:                  # as above
            self.lose(g, error)
            return None


# ---- 2. What the policy reads and writes -------------------------------------------------------------------

PROMPTS = {
    ("alfworld", "full"): """You are acting in a household simulated in text. Your task: {goal}
{skill}{history}Step {step}. You now observe: {observation}
You can take one of these actions: [{actions}]
Your reply MUST hold exactly two elements, in this order: <think>one short sentence of reasoning</think> and \
<action>one action, copied from the list</action>.
For example, in another world: <think>The key may be in the drawer, which is shut.</think><action>open drawer 3</action>
Now reply in the same form for your own world, with an action of your own list.""",
    ("alfworld", "compact"): """{history}now {step} : {observation}
can : {actions}
{skill}task : {goal}""",
    ("webshop", "full"): """You are shopping on the WebShop web site, read as text. Your task: {goal}
{skill}{history}Step {step}. You now see the page: {observation}
You can take one of these actions: [{actions}]
Your reply MUST hold exactly two elements, in this order: <think>one short sentence of reasoning</think> and \
<action>one action, copied from the list</action>.
For example, in another world: <think>The second book has the right author.</think><action>click[b00x2]</action>
Now reply in the same form for your own world, with an action of your own list. In a search, write a query in words of your own.""",
    ("webshop", "compact"): """task : {goal}
{skill}{history}now {step} : {observation}""",
    ("own", "full"): """You are acting in a world that is told in text. Your task: {goal}
{skill}{history}Step {step}. You now observe: {observation}
You can take one of these actions: [{actions}]
Your reply MUST hold exactly two elements, in this order: <think>one short sentence of reasoning</think> and \
<action>one action, copied from the list</action>.
For example, in another world: <think>The bridge is closed, so the ferry must do.</think><action>take the ferry</action>
Now reply in the same form for your own world, with an action of your own list.""",
    ("own", "compact"): """{history}now {step} : {observation}
can : {actions}
{skill}task : {goal}""",
}


class Turn(NamedTuple):
    """A past step of the prompt's history: what was observed, and the action that was then sent."""
    observation: str
    action: str


def render_prompt(goal: str, state: State, history: Sequence[Turn], *, skill: str | None = None,
                  style: str = "full", window: int = 2, world: str = "alfworld") -> str:
    """The user turn of one step: task, last `window` observation-action pairs, observation, admissible actions.

    The fields, and that `help` is not listed, are the GiGPO release's, the words ours; `skill` is the one line of S4.
    `style="compact"`, for the tiny policy, leaves out `look`, `inventory` and `examine`, too; on WebShop it has no list
    but brackets what can be clicked, and stars what the task names. Of any other world than these two, all is shown as it
    is, under the prompts of "own" if PROMPTS has none by its name. An unknown style raises KeyError.
    """
    recent = list(history)[-window:] if window else []
    hidden = ("help",) * (world in ("alfworld", "webshop"))
    if style == "full":
        show = (lambda text: _after_task(text, goal)) if world == "webshop" else str
        past = "".join(f"[Observation {len(history) - len(recent) + i + 1}: {show(t.observation)} Action "
                       f"{len(history) - len(recent) + i + 1}: {t.action}]\n" for i, t in enumerate(recent))
        past = f"Your last {len(recent)} of {len(history)} steps:\n{past}" if recent else ""
        advice = f"Advice from your own experience, which may help: {skill}\n" if skill else ""
        observation = show(state.observation)
        actions = ", ".join(f"'{a}'" for a in state.admissible if a not in hidden)
    else:
        brief = {"webshop": lambda page: _brief_page(page, goal), "alfworld": _brief_room}.get(world, str)
        past = "".join(f"saw : {brief(t.observation)}\ndid : {t.action}\n" for t in recent)
        advice = f"skill : {skill}\n" if skill else ""
        observation = _marked_page(state, goal) if world == "webshop" else brief(state.observation)
        actions = " ; ".join(a for a in state.admissible if not hidden or a not in ("help", "inventory", "look")
                             and not a.startswith("examine"))
    template = PROMPTS[(world, style) if (world, style) in PROMPTS else ("own", style)]
    return template.format(goal=goal, history=past, step=state.steps + 1, observation=observation, actions=actions, skill=advice)


def _brief_room(text: str) -> str:
    """The opening lists all receptacles, and so do the `go to` actions: the compact prompt says it once."""
    return text.partition(" Looking quickly around you")[0]


def _after_task(page: str, goal: str) -> str:
    """What follows the task on a WebShop page, its parts quoted (mode `text`) or its lines as they are (`text_rich`)."""
    rest = page.partition(f"{goal.strip()} [SEP] ")[2]
    if rest:
        return " [SEP] ".join(f"'{part}'" for part in rest.split(" [SEP] "))
    return page.partition(f"{goal.strip()}\n")[2] or page


def _marked_page(state: State, goal: str) -> str:
    """The compact form of a page: what can be clicked stands in brackets, so the actions need no list of their own."""
    parts = state.observation.partition(f"{goal.strip()} [SEP] ")[2].split(" [SEP] ")
    return " ".join(f"[{_starred(part, goal)}]" if f"click[{part.lower()}]" in state.admissible
                    else f"{_starred(part, goal)} ;" for part in parts)


def _starred(part: str, goal: str) -> str:
    """As a browser marks what was searched for, the compact form marks a part of the page that the task names."""
    return f"* {part}" if re.search(rf"\b{re.escape(part.lower())}\b(?!:)", goal.lower()) and part else part


def _brief_page(page: str, goal: str) -> str:
    """What is worth remembering of a past page: a product's name, the text of a page about it, the number of results."""
    if page.startswith("WebShop [SEP] "):
        return "Search"
    parts = page.split(" [SEP] ")[2:]
    for part, following in zip(parts, parts[1:]):
        if following.startswith("Price: "):
            return part
    kept = [_starred(part, goal) for part in parts if part not in ("Back to Search", "< Prev")]
    return kept[0] if kept and kept[0].startswith("Page ") else " ; ".join(kept)


_ACTION = re.compile(r"<action>(.*?)</action>", re.S)


def parse_action(response: str, verbatim: bool = False) -> str | None:
    """The text of the first `<action>...</action>`, lower-cased and with single blanks, or `verbatim`, but for white space around
    it; None if there is none, or no thought anywhere.

    The GiGPO release asks for the same tags; without them it plays the action, or the last 30 characters, as invalid.
    """
    match = _ACTION.search(response)
    if match is None or "<think>" not in response or "</think>" not in response:
        return None
    return (match.group(1).strip() if verbatim else " ".join(match.group(1).lower().split())) or None


# ---- 3. ALFWorld: TextWorld's engine, played functionally ---------------------------------------------------
#
# A game file holds PDDL rules, one household with its goal, and a text grammar. TextWorld plays it with Fast Downward
# (a compiled library that holds the state of the world) and writes the text itself. Both are used here as they are;
# what makes the stock environment slow is left out:
# - the PDDL is translated four times per load and reset: here once, and the last translations are kept;
# - the grammar is parsed anew for every game, its texts and queries in every step: here once;
# - contexts are deep-copied for every admissible command: here they are plain dictionaries, shared;
# - a state already visited by any rollout of the group is not computed again.
# Text, admissible commands, reward and end are the same to the byte; the tests play both side by side.

SHORTAGES = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS}
BANNER = "-= Welcome to TextWorld, ALFRED! =-\n\n"        # TextWorld's; it says nothing, so policies don't see it
STAND_IN = "UNKNOWN GOAL"                                 # as in the grammar that alfworld ships
Facts = dict[str, list[tuple[str, ...]]]                  # predicate -> its true argument tuples, sorted


def _import_alfworld() -> None:
    """On import, alfworld makes the folder that $ALFWORLD_DATA names, or one in the home, and sets the variable. Here it is told
    of a folder that is there anyway, and the variable stays as the user has it."""
    before = os.environ.get("ALFWORLD_DATA")
    os.environ["ALFWORLD_DATA"] = tempfile.gettempdir()
    try:
        import_module("alfworld.info")
    finally:
        os.environ.pop("ALFWORLD_DATA")
        os.environ.update({} if before is None else {"ALFWORLD_DATA": before})


@lru_cache(maxsize=1)
def _textworld() -> SimpleNamespace:
    """The parts of TextWorld that are used, imported late: they take a second."""
    if sys.version_info >= (3, 13):
        raise ImportError("TextWorld's PDDL engine does not run on Python 3.13 or newer; use Python 3.10 to 3.12")
    try:
        _import_alfworld()
        import fast_downward
        from alfworld.agents.utils.misc import Demangler
        from fast_downward.translate.pddl.conditions import Atom
        from textworld.envs.pddl import logic, textgen
        from textworld.generator.game import EntityInfo
        from textworld.logic import Rule
    except ImportError as error:
        raise ImportError(f"ALFWorld is not installed ({error}); run `pip install -r requirements.txt` (its Fast Downward is "
                          "compiled on the spot, which takes cmake, a C++ compiler and some minutes)") from error
    # Each open game has a copy of this library in $TMPDIR: 33 MB, nearly all of it for debuggers, or 1.3 MB without that.
    thin = tempfile.TemporaryDirectory(prefix="siri-", ignore_cleanup_errors=True)
    whole, stripped, tool = fast_downward.interface.DOWNWARD_LIB_PATH, f"{thin.name}/libdownward.so", shutil.which("strip")
    if tool and subprocess.run([tool, "-g", "-o", stripped, whole], capture_output=True).returncode == 0:
        fast_downward.interface.DOWNWARD_LIB_PATH = stripped
    return SimpleNamespace(thin=thin, fd=fast_downward, Atom=Atom, logic=logic, textgen=textgen, EntityInfo=EntityInfo, Rule=Rule,
                           Demangler=Demangler)


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    with within(TRANSLATION_S, "its grammar"):
        return _textworld().logic.GameLogic("", text)


def _grammar(text: str) -> tuple[Any, str]:
    """The parsed grammar, and the goal. Games differ in one sentence only, so it is parsed with a stand-in for that."""
    goal = re.search(r"(?<=Your task is to: )[\w ,'-]+", text)
    return (_parsed(text.replace(goal[0], STAND_IN)), goal[0]) if goal else (_parsed(text), STAND_IN)


@lru_cache(maxsize=4096)
def _symbols(text: str) -> list:
    return _textworld().textgen._parse_and_convert(text, rule_name="symbols")


@lru_cache(maxsize=4096)
def _query(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """`p(x:t) & q(x:t, y:u)` as [(predicate, [(variable, type), ...]), ...]."""
    rule = _textworld().Rule.parse_conjunctive_query(text)
    return [(p.name, [(ph.name, ph.type) for ph in p.parameters]) for p in rule.preconditions]


@lru_cache(maxsize=256)
def _asked(template: str) -> tuple[str, ...] | None:
    """The predicates that a command's template asks about; None if it has rules, which may ask about any. (Those for the
    words between the items of a list are taken not to.)"""
    parts = [symbol.symbol if type(symbol).__name__ == "ListSymbol" else symbol for symbol in _symbols(template)]
    if any(type(x).__name__ == "NonterminalSymbol" for part in parts for x in (part, getattr(part, "expression", None))):
        return None
    return tuple(predicate for part in parts if getattr(part, "given", "") for predicate, _ in _query(part.given))


@lru_cache(maxsize=4096)
def _expression(text: str) -> Any:
    """A grammar expression such as `o.indefinite + ' ' + o.name`, compiled. Game files come from elsewhere, and TextWorld
    evaluates what they say: nothing but names, their public attributes, text, `+` and `or` is let through here."""
    tree = ast.parse(text.strip(), mode="eval")
    allowed = (ast.Expression, ast.Name, ast.Load, ast.Attribute, ast.Constant, ast.BinOp, ast.Add, ast.BoolOp, ast.Or)
    for node in ast.walk(tree):
        if not isinstance(node, allowed) or (isinstance(node, ast.Attribute) and node.attr.startswith("_")):
            raise ValueError(f"the grammar expression {text!r} may only use names, their attributes, text, + and or")
    return compile(tree, text, "eval")


class _World(NamedTuple):
    """A translated game: Fast Downward's input, and what the text needs to know about it."""
    sas: bytes                                      # compressed: a full game's is near a megabyte, and many are kept
    facts: dict[str, list[tuple[str, ...]]]         # predicate -> rows of arguments
    types: dict[str, str]                           # object -> type
    supertypes: dict[str, list[str]]                # type -> itself and its supertypes
    parameters: dict[str, list[tuple[str, str]]]    # action -> (variable, type)


@lru_cache(maxsize=256)
def _translate(domain: str, problem: str) -> _World:
    """The translated game; the dearest part of opening one, so the last are kept. ValueError if it can't be translated."""
    if "\0" in domain + problem:                   # for the library its input would end there, and it would end the process
        raise ValueError("its PDDL holds a zero byte")
    tw, argv, out = _textworld(), sys.argv, sys.stdout
    sys.stdout = io.StringIO()
    try:                                            # the translator rewrites sys.argv and prints
        with within(TRANSLATION_S, "its translation"):
            task, sas = tw.fd.pddl2sas(domain, problem)
    except SystemExit as error:                     # how the translator reports bad PDDL
        raise ValueError(f"Fast Downward rejects its PDDL (exit {error.code})") from error
    finally:
        sys.argv, sys.stdout = argv, out
    facts: dict[str, list] = defaultdict(list)
    for atom in task.init:
        if isinstance(atom, tw.Atom) and atom.predicate != "=":
            facts[atom.predicate].append(atom.args)
    return _World(zlib.compress(sas.encode(), 1), {name: sorted(rows) for name, rows in facts.items()},
                  {o.name: o.type_name for o in task.objects},
                  {t.name: [t.name, *t.supertype_names] for t in task.types},
                  {a.name: [(p.name.strip("?"), p.type_name) for p in a.parameters] for a in task.actions})


def _literal(name: str) -> tuple[str, tuple[str, ...]]:
    """Fast Downward's "Atom p(a, b)" as ("p", ("a", "b")), "NegatedAtom p(a)" as ("not_p", ("a",))."""
    sign, rest = name.split(" ", 1)
    predicate, arguments = rest[:-1].split("(", 1)
    return ("not_" if sign == "NegatedAtom" else "") + predicate, tuple(a for a in arguments.split(", ") if a)


class _Node:
    """One state of a household. `children` remembers the steps already taken from it."""
    __slots__ = ("id", "facts", "delta", "won", "commands", "admissible", "children")
    id: int
    facts: Facts
    delta: frozenset
    won: bool
    commands: dict[str, tuple]
    admissible: tuple[str, ...]
    children: dict[str, tuple[_Node, str]]


class AlfEngine:
    """One Fast Downward library, one game at a time: `step` from any node, in any order.

    Raises ImportError, with the mend, where TextWorld's engine is missing or can't run.
    """

    def __init__(self) -> None:
        self.fd = _textworld().fd
        try:
            self.lib = self.fd.load_lib()
        except OSError as error:
            size = os.path.getsize(self.fd.interface.DOWNWARD_LIB_PATH) / 1e6
            raise MachineFault(f"Fast Downward's library can't be loaded from {tempfile.gettempdir()} ({error}): each open game "
                               f"needs {size:.1f} MB there{' (1.3 with `strip` of binutils)' if size > 5 else ''} and the right to "
                               "execute; make room, or set TMPDIR to another folder") from error

    def load(self, data: Mapping[str, Any]) -> None:
        """Translate a game in ALFWorld's format (`pddl_game`): `root` is then its first node, `intro` its opening text.

        Raises KeyError for a part that is missing, ValueError for PDDL that Fast Downward rejects or a grammar that
        lacks a rule or evaluates more than names and text, and what TextWorld's parsers raise.
        """
        self.world = _translate(data["pddl_domain"], data["pddl_problem"])
        self.logic, goal = _grammar(data["grammar"])
        self.lib.load_sas(zlib.decompress(self.world.sas))
        facts = defaultdict(set, {name: set(map(tuple, rows)) for name, rows in self.world.facts.items()})
        atoms = (self.fd.Atom * self.lib.get_state_size())()
        self.lib.get_state(atoms)
        for predicate, arguments in map(_literal, (a.name for a in atoms)):
            if not predicate.startswith("not_"):
                facts[predicate].add(arguments)
        used = {a for rows in facts.values() for row in rows for a in row}
        self.parameters = self.world.parameters
        self.entities = {name: _textworld().EntityInfo(name, self.world.types[name]) for name in used}
        demangler = _textworld().Demangler(game_infos=self.entities)
        for info in self.entities.values():
            info.name, info.definite, info.indefinite = demangler.demangle_alfred_name(info.id), "the", "a"
        self.nodes: dict[Any, _Node] = {}
        self.operators: dict[int, tuple[str, str, dict]] = {}       # Fast Downward's number -> name, action, binding
        self.written: dict[tuple[int, ...], str] = {}               # commands, see `_command`
        self.root = self._node({name: sorted(rows) for name, rows in facts.items()}, frozenset())
        self.intro = self._write("#intro#", self.root.facts, {}).replace(STAND_IN, goal)

    def step(self, node: _Node, command: str) -> tuple[_Node, str]:
        """The next node, and TextWorld's feedback: "Nothing happens.", at the same node, to an inadmissible command."""
        command = command.strip()
        if command not in node.commands:
            return node, "Nothing happens."
        if command not in node.children:
            operator, count, action, binding = node.commands[command]
            self.lib.set_state_id(node.id)
            effects = (self.fd.Atom * count)()
            self.lib.apply_operator(operator, effects)
            facts, changed = dict(node.facts), set[tuple]()
            for predicate, row in map(_literal, (e.name for e in effects)):
                opposite = predicate[4:] if predicate.startswith("not_") else "not_" + predicate
                if row in facts.get(opposite, ()):
                    facts[opposite] = [r for r in facts[opposite] if r != row]
                    changed ^= {(opposite, row)}
                if row not in facts.get(predicate, ()):
                    facts[predicate] = sorted([*facts.get(predicate, ()), row])
                    changed ^= {(predicate, row)}
            after = self._node(facts, node.delta ^ changed)
            node.children[command] = after, self._write(self.logic.actions[action].feedback_rule, facts, binding)
        return node.children[command]

    def _node(self, facts: Facts, delta: frozenset) -> _Node:
        """The node of the library's current state. `delta`, the facts changed since the root, is part of its identity:
        TextWorld keeps a `not_p` once an action has deleted `p`, and Fast Downward's state doesn't tell."""
        key = (self.lib.get_state_id(), delta)
        if key in self.nodes:
            return self.nodes[key]
        node = self.nodes[key] = _Node()
        node.id, node.facts, node.delta, node.children, node.commands = key[0], facts, delta, {}, {}
        node.won = bool(self.lib.check_goal())
        operators = (self.fd.Operator * self.lib.get_applicable_operators_count())()
        self.lib.get_applicable_operators(operators)
        for operator in operators:
            if operator.id not in self.operators:
                action, *arguments = operator.name.split()
                self.operators[operator.id] = operator.name, action, dict(zip(self.parameters[action], arguments))
        for operator in {self.operators[op.id][0]: op for op in reversed(operators)}.values():
            _, action, binding = self.operators[operator.id]
            command = self._command(operator.id, facts)
            node.commands[command] = (operator.id, operator.nb_effect_atoms, action, binding)
        node.admissible = tuple(sorted(node.commands))
        return node

    def _command(self, operator: int, facts: Facts) -> str:
        """An operator's command, written once as long as the facts that it asks about are the same lists: a changed fact
        makes a new list, and nodes keep theirs."""
        _, action, binding = self.operators[operator]
        template = self.logic.actions[action].template
        if (asked := _asked(template)) is None:
            return self._write(template, facts, binding)
        key = operator, *(id(facts.get(predicate)) for predicate in asked)
        if key not in self.written:
            self.written[key] = self._write(template, facts, binding)
        return self.written[key]

    # From facts to sentences: TextWorld's grammar, without its copies.

    def _write(self, text: str, facts: Facts, binding: dict) -> str:
        return "".join(self._symbol(s, facts, binding) for s in _symbols(text))

    def _symbol(self, symbol: Any, facts: Facts, binding: dict) -> str:
        kind = type(symbol).__name__
        if kind == "TerminalSymbol":                                            # text
            return symbol.symbol
        if kind == "EvalSymbol":                                                # {o.name}
            values = {name: self.entities[value] for (name, _), value in binding.items()}
            return str(eval(_expression(symbol.expression), {"__builtins__": {}}, values))
        if kind == "NonterminalSymbol":                                         # #rule#
            for rule in self.logic.grammar._rules[symbol.symbol]:
                if not rule.condition or next(self._answers(_query(rule.condition), facts, binding), None) is not None:
                    return "".join(self._symbol(s, facts, binding) for s in rule.rhs)
            raise ValueError(f"no rule of the grammar applies to #{symbol.symbol}#")
        if kind == "ConditionalSymbol":                                         # {o.name | holds(a, o)}
            return "".join(self._each(symbol, facts, binding))
        items = self._each(symbol.symbol, facts, binding)                       # [{...}], an enumeration
        word = lambda name: self._write(f"#{name}#", facts, binding)
        if len(items) < 2:
            return items[0] if items else word("list_empty")
        return word("list_separator").join(items[:-1]) + word("list_last_separator") + items[-1]

    def _each(self, symbol: Any, facts: Facts, binding: dict) -> list[str]:
        answers = self._answers(_query(symbol.given), facts, binding) if symbol.given else [binding]
        return [self._symbol(symbol.expression, facts, answer) for answer in answers]

    def _answers(self, query: list, facts: Facts, binding: dict) -> Iterator[dict]:
        """All bindings that extend `binding` and make the query true, in TextWorld's order, new values distinct."""
        if not query:
            yield binding
            return
        (predicate, variables), *rest = query
        for row in facts.get(predicate, ()):
            new: dict = {}
            for variable, value in zip(variables, row):
                known = binding.get(variable, new.get(variable))
                if known is None and value not in binding.values() and value not in new.values() \
                        and variable[1] in self.world.supertypes[self.world.types[value]]:
                    new[variable] = value
                elif known != value:
                    break
            else:
                yield from self._answers(rest, facts, {**binding, **new})


# ---- 4. ALFWorld: games and tasks --------------------------------------------------------------------------

class AlfGame(AbstractContextManager):
    """A game, opened on a borrowed engine. `start` and every later `State` can be stepped from again, in any order."""

    def __init__(self, env: AlfWorld, task: Task, data: Mapping[str, Any]) -> None:
        self.env, self.engine = env, env.engines.pop() if env.engines else AlfEngine()
        try:
            self.engine.load(data)
        except BaseException:
            env.engines.append(self.engine)
            raise
        self.task = task
        self.start = self._state(self.engine.root, self.engine.intro.removeprefix(BANNER))

    def step(self, state: State, action: str) -> State:
        """The state after `action`. An inadmissible action is answered "Nothing happens." and marked invalid.

        The episode ends at the goal, or after `max_steps` actions. A state that is done raises ValueError.
        """
        if state.done:
            raise ValueError(f"{self.task.id}: the episode ended after {state.steps} steps; step another state")
        node, text = self.engine.step(state.engine, action)
        steps = state.steps + 1
        return self._state(node, text, reward=SUCCESS_REWARD if node.won else 0.0, done=node.won or steps >= self.env.max_steps,
                           success=node.won, steps=steps, valid=action.strip() in state.engine.commands,
                           score=float(node.won))

    def _state(self, node: _Node, text: str, **outcome: Any) -> State:
        return State(text, node.admissible, anchor="\n".join((text, *node.admissible)), engine=node, **outcome)

    def close(self) -> None:
        """Give the engine back. Engines are never freed: a Fast Downward library can't be unloaded safely."""
        if self.engine is not None:
            for memory in (self.engine.nodes, self.engine.operators, self.engine.written):
                memory.clear()
            _textworld_memory().clear()
            self.env.engines.append(self.engine)
            self.engine = None                  # type: ignore[assignment]    # a closed game is not played

    def __exit__(self, *_: object) -> None:
        self.close()


def _textworld_memory() -> dict:
    """TextWorld remembers every variable and type it ever made (about a megabyte a game); cleared after each game."""
    from mementos import core
    return core._memento_cache


class AlfWorld:
    """Tasks by split, played on TextWorld. `AlfWorld.official(folder)` has the benchmark's games, `.generated(seed)`
    new ones on the official floor plans, `.household(seed)` small ones in a home with habits."""
    name, scored, success_reward = "alfworld", False, SUCCESS_REWARD
    engines: list[AlfEngine] = []                   # free ones, of all worlds of the process: none can ever be unloaded

    def __init__(self, notice: str, tasks: Mapping[str, Sequence[Task]], max_steps: int) -> None:
        self.notice, self.splits, self.max_steps = notice, tasks, max_steps

    @classmethod
    def official(cls, data: str | Path, *, max_steps: int = 50) -> AlfWorld:
        """The games that `alfworld-download` fetches. `data` is the folder `json_2.1.1` or the one around it.

        Like the official loader this leaves out sliced and movable objects and games not marked solvable. Raises
        ValueError for a folder without games, and for a split whose files are not games, naming what is wrong.
        `max_steps` is in actions; 50 is the GiGPO release's.
        """
        folder = Path(os.path.expanduser(data))
        folder = folder if folder.name == "json_2.1.1" else folder / "json_2.1.1"
        if not folder.is_dir():
            raise ValueError(f"no ALFWorld games: {folder} is not a folder; get them with `alfworld-download` and give the "
                             "folder that holds json_2.1.1")
        splits = {}
        for split in SPLIT_COUNTS:
            found = []
            for path in sorted((folder / split).glob("**/game.tw-pddl")):
                name = path.parent.relative_to(folder).as_posix()
                if "movable" not in name and "Sliced" not in name:
                    solvable, goal = _glance(path)
                    if solvable:
                        found.append(Task(name, path.parent.parent.name.partition("-")[0], goal, split, path))
            if not found:
                raise ValueError(f"no ALFWorld games in {folder / split}; get them again with `alfworld-download`")
            splits[split] = found
        counts = ", ".join(f"{split} {len(tasks)}" for split, tasks in splits.items())
        return cls(f"ALFWorld: the official games in {folder} ({counts}).", splits, max_steps)

    @classmethod
    def generated(cls, seed: int = 0, *, max_steps: int = 50) -> AlfWorld:
        """New games, drawn from `seed`, in ALFWorld's format on official floor plans; as many as the benchmark has."""
        notice = ("ALFWorld: GENERATED games (scores are not ALFWorld benchmark scores), played on TextWorld's engine, as no "
                  "data folder was given or found.")
        return cls(notice, {split: GeneratedTasks(split, seed) for split in SPLIT_COUNTS}, max_steps)

    @classmethod
    def household(cls, seed: int = 0, *, max_steps: int = 10, share: float = 0.5) -> AlfWorld:
        """Small generated games in the household with this number. `share` of all object classes occur in it: half of
        them, a dozen, can be learnt about in minutes."""
        notice = (f"ALFWorld: small GENERATED games (scores are not ALFWorld benchmark scores) in household {seed}, played on "
                  "TextWorld's engine.")
        home = Household(seed, share=share)
        return cls(notice, {split: GeneratedTasks(split, 0, home) for split in SPLIT_COUNTS}, max_steps)

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of "train", "valid_seen" or "valid_unseen"; another split raises KeyError."""
        return self.splits[split]

    def _data(self, task: Task) -> Mapping[str, Any]:
        return pddl_game(task.data) if isinstance(task.data, Scene) else json.loads(task.data.read_text("utf-8"))

    def open(self, task: Task) -> AlfGame:
        """The task's game, on a free engine or a new one. Raises ValueError naming a game that is not sound, and MachineFault."""
        try:
            return AlfGame(self, task, self._data(task))
        except MachineFault:
            raise
        except (MemoryError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in SHORTAGES:
                raise ValueError(f"{task.id}: cannot be read ({error}); get it again with `alfworld-download`") from error
            raise MachineFault(f"{task.id}: cannot be opened ({type(error).__name__}: {error}): the machine is out of memory, disk "
                               "or file handles (`ulimit -n`)") from error
        except Exception as error:                  # whatever is wrong with a file from elsewhere, say which file it is
            raise ValueError(f"{task.id} is not a sound ALFWorld game ({type(error).__name__}: {' '.join(str(error).split())}); "
                             "get it again with `alfworld-download`") from error


def _glance(path: Path) -> tuple[bool, str]:
    """Whether a game file is marked solvable, and its goal, without parsing 100 kB of JSON."""
    if not path.is_file() or path.stat().st_size > 1e6 * GAME_MB:            # a pipe would be waited for, for ever
        raise ValueError(f"{path} is no file, or has more than {GAME_MB} MB; get it again with `alfworld-download`")
    text = path.read_bytes()
    mark = re.search(rb'"solvable":\s*(true|false)', text)
    goal = re.search(rb'Your task is to: ([^"\\]*?)\.?\\"', text)
    if not mark or not goal:
        raise ValueError(f"{path} is not an ALFWorld game (no {'goal' if mark else 'mark `solvable`'}); "
                         "get it again with `alfworld-download`")
    return mark[1] == b"true", goal[1].decode(errors="replace")


def alfworld_data_variable() -> str:
    """What $ALFWORLD_DATA names; empty where it is not set."""
    found, cache = os.environ.get("ALFWORLD_DATA", ""), Path(os.path.expanduser("~/.cache/alfworld"))
    # A program that imported alfworld by itself has the variable set to this cache, which says nothing while it is empty.
    return "" if found and Path(found) == cache and not (cache / "json_2.1.1").is_dir() else found


def make(name: str, *, data: str = "", compact: bool = False, max_steps: int = 50, seed: int = 0,
         **shop: str) -> Environment:
    """The environment that a configuration asks for: "alfworld" or "webshop", of the files in `data` or generated.

    `seed` draws what is generated, `max_steps` is in actions, `shop` are settings of `make_shop`. `compact`: the tiny
    policy's small world, on ALFWorld whatever `data` says. ALFWorld's empty `data` means $ALFWORLD_DATA, read alike; without either
    the games are generated. Raises ValueError or ImportError with the mend.
    """
    if name == "webshop":
        return make_shop(data, compact, max_steps, seed, **shop)
    if name != "alfworld":
        raise ValueError(f"environment {name!r} is unknown; there are: alfworld, webshop")
    _textworld()
    if compact:
        return AlfWorld.household(seed, max_steps=max_steps)
    if not (found := data or alfworld_data_variable()):
        return AlfWorld.generated(seed, max_steps=max_steps)
    try:
        return AlfWorld.official(found, max_steps=max_steps)
    except ValueError as error:
        raise error if data else ValueError(f"$ALFWORLD_DATA: {error}; or unset it, for generated games") from error


# ---- 5. Generated games: what the wheel knows ---------------------------------------------------------------------------------

TRANSLATION_S = 30                                              # seconds at most, of which a game takes half a one
GAME_MB = 10                                                    # megabytes of a game's file at most; the largest has .2
KIND_COUNTS = {"pick_and_place_simple": 790, "look_at_obj_in_light": 308, "pick_clean_then_place_in_recep": 650,
               "pick_heat_then_place_in_recep": 459, "pick_cool_then_place_in_recep": 533,
               "pick_two_obj_and_place": 813}                   # training games of each type in the original data
SPLIT_COUNTS = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}
UNSEEN_PLANS = (10, 219, 308, 424)                              # held out for valid_unseen, as in the original data
# Task types that change the object: its affordance, the receptacle class that does it, the PDDL fact, the command.
PROCESSES = {"pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin", "isClean", "clean"),
             "pick_heat_then_place_in_recep": ("Heatable", "Microwave", "isHot", "heat"),
             "pick_cool_then_place_in_recep": ("Coolable", "Fridge", "isCool", "cool")}
LAMP_STANDS = ("Desk", "SideTable", "Dresser", "DiningTable", "Shelf", "CoffeeTable")   # the first there has the lamp


@cache
def wheel() -> SimpleNamespace:
    """The tables of alfworld's wheel, read on first use. None of this needs AI2-THOR, torch or the data set."""
    _import_alfworld()
    from alfworld.gen import constants, goal_library
    root = files("alfworld")
    fixed = sorted(set(constants.VAL_RECEPTACLE_OBJECTS) - constants.MOVABLE_RECEPTACLES_SET)
    return SimpleNamespace(
        domain=(root / "data/alfred.pddl").read_text(), grammar=(root / "data/alfred.twl2").read_text(),
        layouts=root / "gen/layouts", goals=goal_library.gdict,
        plans=constants.SCENE_TYPE, rooms=constants.GOALS_VALID,        # room -> floor plans, task type -> rooms
        affords=constants.VAL_ACTION_OBJECTS, openable=constants.OPENABLE_CLASS_SET,
        vessels=constants.MOVABLE_RECEPTACLES_SET,              # objects that hold objects, like bowls
        holds={place: constants.VAL_RECEPTACLE_OBJECTS[place] for place in fixed})   # receptacle -> object classes


@dataclass(frozen=True)
class Scene:
    """A game before it is written as PDDL. Ids are PDDL names, classes are ALFRED's (`CounterTop`)."""
    kind: str
    target: str                                     # object class that the task is about
    destination: str                                # receptacle class it goes to, or "DeskLamp"
    template: int                                   # which of the two wordings of the task
    receptacles: tuple[tuple[str, str], ...]        # (id, class); each stands at a location of its own
    objects: tuple[tuple[str, str, str], ...]       # (id, class, id of the receptacle it is in)
    holds_all: bool = False                         # any receptacle can hold any object

    @property
    def goal(self) -> str:
        """The sentence that the policy is given, by ALFRED's template."""
        return wheel().goals[self.kind]["templates"][self.template].format(
            obj=self.target.lower(), recep=self.destination.lower(), toggle=self.destination.lower())


def entity(cls: str, number: int) -> str:
    """The PDDL name of an instance; ALFWorld shows the part before `_bar_`, plus `basin` where the name has that."""
    return f"{cls[:-5]}_bar_{number}_bar_{cls}" if cls.endswith("Basin") else f"{cls}_bar_{number}"


# ---- 6. Games on official floor plans ------------------------------------------------------------------------

@cache
def floor_plan(number: int) -> tuple[dict[str, list[str]], list[str], bool]:
    """One of the 120 rooms: its receptacles' ids by class, its movable object classes, whether it has a desk lamp.

    Another number raises FileNotFoundError.
    """
    present, listed = (json.loads((wheel().layouts / f"FloorPlan{number}-{what}.json").read_text())
                       for what in ("objects", "openable"))
    # `listed` names instances, "Sink|-01.90|+00.97|-01.50|SinkBasin", but leaves out fixtures such as stove burners.
    count = Counter(next(part for part in reversed(name.split("|")) if part.isalpha()) for name in listed)
    count.update({p: 4 if p == "StoveBurner" else 1 for p in wheel().holds if p in present and p not in count})
    ids = {p: [entity(p, i) for i in range(count[p])] for p in sorted(count)}
    objects = sorted(o for o in present if any(o in wheel().holds[p] for p in ids))
    return ids, objects, "DeskLamp" in present and any(p in ids for p in LAMP_STANDS)


@cache
def possible_goals(kind: str, number: int) -> dict[str, list[str]]:
    """What can be asked in a room: destination -> targets that fit there and have somewhere else to start."""
    ids, objects, lit = floor_plan(number)
    if kind == "look_at_obj_in_light":
        return {"DeskLamp": objects} if lit else {}
    affordance, machine, *_ = PROCESSES.get(kind, (None, None))
    goals = {p: [o for o in objects if o in wheel().holds[p] and (not affordance or o in wheel().affords[affordance])
                 and any(o in wheel().holds[q] for q in ids if q != p)]
             for p in ids if p != machine and (not machine or machine in ids)}
    return {p: targets for p, targets in goals.items() if targets}


@cache
def plans_for(kind: str, unseen: bool) -> list[int]:
    """The floor plans of a split in which a task type is possible; an unknown type raises KeyError."""
    rooms = [n for room in sorted(wheel().rooms[kind]) for n in wheel().plans[room]]
    return [n for n in rooms if (n in UNSEEN_PLANS) == unseen and possible_goals(kind, n)]


def floor_plan_scene(rng: random.Random, split: str) -> tuple[Scene, str]:
    """Draw a task and furnish the room: one to three of each object class, each somewhere plausible.

    Task types are as frequent as in the original training games. Returns the scene and the floor plan's number.
    """
    kind = rng.choices(list(KIND_COUNTS), list(KIND_COUNTS.values()))[0]
    number = rng.choice(plans_for(kind, split == "valid_unseen"))
    goals, (ids, classes, lit) = possible_goals(kind, number), floor_plan(number)
    destination = rng.choice(list(goals))
    target = rng.choice(goals[destination])
    objects = []
    for cls in classes:
        places = [p for p in ids if cls in wheel().holds[p] and (cls, p) != (target, destination)]
        for i in range(rng.randint(2 if cls == target and kind == "pick_two_obj_and_place" else 1, 3)):
            objects.append((entity(cls, i), cls, rng.choice(ids[rng.choice(places)])))
    if lit:
        objects.append((entity("DeskLamp", 0), "DeskLamp", rng.choice(ids[next(p for p in LAMP_STANDS if p in ids)])))
    receptacles = tuple((name, p) for p in ids for name in ids[p])
    return Scene(kind, target, destination, rng.randrange(2), receptacles, tuple(objects)), str(number)


# ---- 7. Games in a household with habits ---------------------------------------------------------------------

ROOMS = {   # room: places that can be an object's usual one, appliances, object classes
    "Kitchen": ("CounterTop Cabinet Drawer Shelf SideTable DiningTable StoveBurner GarbageCan".split(),
                "Fridge Microwave SinkBasin".split(),
                "Apple Bowl Bread Cup Egg Fork Lettuce Mug Plate Potato Spoon Tomato".split()),
    "LivingRoom": ("Sofa ArmChair CoffeeTable DiningTable Shelf SideTable Desk Drawer Dresser Cabinet".split(), [],
                   "Candle Cloth Newspaper Statue Vase Watch".split()),
    "Bedroom": ("Bed ArmChair Dresser Shelf SideTable Desk Drawer Safe Cabinet GarbageCan".split(), [],
                "Book CD Laptop Pen Pencil Pillow".split()),
}


class Household:
    """A home with habits: `habit[object class]` is its usual place, drawn anew for every household.

    So what is learnt in one household helps in its other games and in no other household. Games are small: 8 or 9
    receptacles of distinct classes, 4 to 8 objects, one of each class (two of the target in pick-two tasks), a
    destination that needs no opening, the desk lamp on the desk. Pairs of target and destination in `valid_unseen`
    occur in no other split. A `share` that leaves a room without object classes raises IndexError.
    """

    def __init__(self, seed: int, loyalty: float = 0.9, share: float = 1.0):
        rng, stock = random.Random(f"household/{seed}"), random.Random(f"household/{seed}/objects")
        self.seed, self.loyalty = seed, loyalty     # loyalty: the chance that an object is in its usual place
        self.objects = {room: sorted(stock.sample(objects, round(share * len(objects))))    # share: of all classes
                        for room, (_, _, objects) in ROOMS.items()}
        self.habit = {o: rng.choice(places) for places, _, objects in ROOMS.values() for o in objects}
        self.unseen = {(rng.choice(objects), "DeskLamp") for objects in self.objects.values()}
        for room, objects in self.objects.items():
            self.unseen |= {(o, p) for o in objects for p in rng.sample(self.destinations(room, o), 2)}

    def destinations(self, room: str, target: str) -> list[str]:
        """Where an object class can be asked to go in a room: places that need no opening, but for its usual one."""
        return [p for p in ROOMS[room][0] if p not in wheel().openable and p != self.habit[target]]

    def scene(self, rng: random.Random, split: str) -> tuple[Scene, str]:
        """Draw a task, each type as often as any other, and furnish a room for it. Returns the scene and the room."""
        kind = rng.choice(list(KIND_COUNTS))
        room = rng.choice([r for r in ROOMS if r in wheel().rooms[kind]])
        places, appliances, classes = *ROOMS[room][:2], self.objects[room]
        lit, (affordance, machine, *_) = kind == "look_at_obj_in_light", PROCESSES.get(kind, (None, None))
        target, destination = rng.choice([
            (o, p) for o in classes for p in (["DeskLamp"] if lit else self.destinations(room, o))
            if (not affordance or o in wheel().affords[affordance])
            and ((o, p) in self.unseen) == (split == "valid_unseen")])
        needed = {self.habit[target], "Desk" if lit else destination, machine or self.habit[target]}
        spare = [p for p in places + appliances if p not in needed]
        standing = sorted([*needed, *rng.sample(spare, rng.randint(8, 9) - len(needed))])
        others = [o for o in classes if o != target and self.habit[o] in standing]
        drawn = [target] * (2 if kind == "pick_two_obj_and_place" else 1)
        drawn += rng.sample(others, min(len(others), rng.randint(3, 6)))
        objects = [(entity("DeskLamp", 1), "DeskLamp", entity("Desk", 1))] if lit else []
        for i, o in enumerate(drawn):
            usual = self.habit[o]
            elsewhere = [p for p in standing if p != usual and (o, p) != (target, destination)]
            place = usual if rng.random() < self.loyalty else rng.choice(elsewhere)
            objects.append((entity(o, i), o, entity(place, 1)))
        receptacles = tuple((entity(p, 1), p) for p in standing)
        return Scene(kind, target, destination, 0, receptacles, tuple(objects), holds_all=True), room


# ---- 8. Tasks and PDDL ---------------------------------------------------------------------------------------

def generate_task(index: int, *, split: str, seed: int = 0, household: Household | None = None) -> Task:
    """Game `index` of a split; its data is a small `Scene`. A pure function of the arguments, on every machine."""
    home = f"household{household.seed}" if household else "plans"
    rng = random.Random(f"{home}/{seed}/{split}/{index}")       # a string seed goes through SHA-512, not hash()
    scene, room = household.scene(rng, split) if household else floor_plan_scene(rng, split)
    name = f"{home}-{seed}/{split}/{index:04d}/{scene.kind}-{scene.target}-None-{scene.destination}-{room}"
    return Task(name, scene.kind, scene.goal, split, scene)


def pddl_game(scene: Scene) -> dict:
    """A scene in ALFWorld's format. Only what the room has is declared, which keeps Fast Downward's work small."""
    rtypes, otypes = ({cls for _, cls, *_ in things} for things in (scene.receptacles, scene.objects))
    declared = {"agent1 - agent", "loc_start - location", *(f"loc_{r} - location" for r, _ in scene.receptacles),
                *(f"{r} - receptacle" for r, _ in scene.receptacles), *(f"{o} - object" for o, _, _ in scene.objects),
                *(f"{c}Type - rtype" for c in rtypes | {"SinkBasin", "Microwave", "Fridge"}),   # the domain's actions
                *(f"{c}Type - otype" for c in otypes | {"Knife", "ButterKnife"})}               # name these five
    facts = ["atLocation agent1 loc_start"]
    for name, cls in scene.receptacles:
        facts += [f"receptacleType {name} {cls}Type", f"receptacleAtLocation {name} loc_{name}"]
        facts += [f"openable {name}"] if cls in wheel().openable else []
    for name, cls, place in scene.objects:
        facts += [f"objectType {name} {cls}Type", f"inReceptacle {name} {place}",
                  f"objectAtLocation {name} loc_{place}"]
        facts += [f"{affordance.lower()} {name}" for affordance, able in wheel().affords.items() if cls in able]
        facts += [f"pickupable {name}"] if cls != "DeskLamp" else []
        facts += [f"isReceptacleObject {name}"] if cls in wheel().vessels else []
    facts += [f"canContain {r}Type {o}Type" for r in sorted(rtypes) for o in sorted(otypes - {"DeskLamp"})
              if scene.holds_all or o in wheel().holds[r]]
    goal = wheel().goals[scene.kind]["pddl"].format(obj=scene.target, recep=scene.destination,
                                                    toggle=scene.destination)
    problem = "\n".join(["(define (problem generated)", "(:domain alfred)", "(:objects", *sorted(declared), ")",
                         "(:init", *(f"({fact})" for fact in facts), ")", goal.replace("#", "-")])
    return {"pddl_domain": wheel().domain, "grammar": wheel().grammar.replace("UNKNOWN GOAL", scene.goal),
            "pddl_problem": problem, "solvable": True}


class GeneratedTasks(Sequence):
    """The tasks of a split, made when asked for. An index below 0 or past the end raises IndexError."""

    def __init__(self, split: str, seed: int, household: Household | None = None):
        self.split, self.seed, self.household = split, seed, household

    def __len__(self) -> int:
        return SPLIT_COUNTS[self.split]

    def __getitem__(self, index: int) -> Task:              # type: ignore[override]    # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        return generate_task(index, split=self.split, seed=self.seed, household=self.household)


# ---- 9. WebShop: the search engine --------------------------------------------------------------------------
#
# BM25 that ranks as Lucene 9 does under Anserini's defaults (k1 .9, b .4, English analyzer, Porter stems). Lucene computes
# in 32-bit floats from lengths kept in one byte; both are reproduced, as either one changes what ties, and so the ranking.

K1, B, ONE = np.float32(0.9), np.float32(0.4), np.float32(1)
EXACT_LENGTHS = 24    # Lucene's byte holds lengths below this as they are: 255 - longToInt4(2**31 - 1)
WINDOW = 255    # characters that Lucene's tokenizer sees at a time: no token is longer
STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)
# The stemmer is slow, and leaves every word with another ending as it is.
STEMMED = tuple("s ed ing y e ll al ful er ator ic ant ent ion ou ism ci gi li ti".split())

# Lucene's StandardTokenizer keeps the words of Unicode's annex 29, runs of South-East Asian letters, single ideographs
# and hiragana, and emoji. Its grammar is spelled out, because the WORD flag of regex departs from the annex after
# apostrophes ('été is one word to it). What may lead a token is bounded by the window, as a rule of n underscores would
# otherwise cost n**2.
ASCII_TOKEN = re.compile(
    r"_{0,254}[^\W_]\w*(?:['.:,;](?:(?<=[a-zA-Z]['.:])(?=[a-zA-Z])|(?<=[0-9]['.,;])(?=[0-9]))\w+)*", re.ASCII
)
MARKS = r"[[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]--[\U0001F3FB-\U0001F3FF]]*"    # skin tones were no marks in Unicode 9
TONES = r"[[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]--[\U0001F3FB-\U0001F3FF\uFE0E\uFE0F]]*"    # marks but for selectors
JOINER = rf"(?:\p{{WB=ExtendNumLet}}{MARKS})"
HEBREW = rf"""\p{{WB=Hebrew_Letter}}{MARKS}(?:'{MARKS}|"{MARKS}(?=\p{{WB=Hebrew_Letter}}))?"""
LETTER = rf"(?:{HEBREW}|\p{{WB=ALetter}}{MARKS})"
LETTERS = rf"{LETTER}(?:(?:[\p{{WB=MidLetter}}\p{{WB=MidNumLet}}']{MARKS})?{LETTER})*"
DIGIT = rf"\p{{WB=Numeric}}{MARKS}"
DIGITS = rf"{DIGIT}(?:(?:[\p{{WB=MidNum}}\p{{WB=MidNumLet}}']{MARKS})?{DIGIT})*"
RUN = rf"(?:(?:\p{{WB=Katakana}}{MARKS})+|(?:{LETTERS}|{DIGITS})+)"
# Extended_Pictographic of Unicode 16, code points in hex: every Emoji that is no digit, #, *, flag letter or skin tone. Spelled
# out, because Unicode 17, and so newer releases of `regex`, took 700 symbols away that are words to Lucene, such as a black star.
PICTURES = """A9 AE 203C 2049 2122 2139 2194-2199 21A9-21AA 231A-231B 2328 2388 23CF 23E9-23F3 23F8-23FA 24C2 25AA-25AB 25B6
    25C0 25FB-25FE 2600-2605 2607-2612 2614-2685 2690-2705 2708-2712 2714 2716 271D 2721 2728 2733-2734 2744 2747
    274C 274E 2753-2755 2757 2763-2767 2795-2797 27A1 27B0 27BF 2934-2935 2B05-2B07 2B1B-2B1C 2B50 2B55 3030 303D
    3297 3299 1F000-1F0FF 1F10D-1F10F 1F12F 1F16C-1F171 1F17E-1F17F 1F18E 1F191-1F19A 1F1AD-1F1E5 1F201-1F20F
    1F21A 1F22F 1F232-1F23A 1F23C-1F23F 1F249-1F3FA 1F400-1F53D 1F546-1F64F 1F680-1F6FF 1F774-1F77F 1F7D5-1F7FF
    1F80C-1F80F 1F848-1F84F 1F85A-1F85F 1F888-1F88F 1F8AE-1F8FF 1F90C-1F93A 1F93C-1F945 1F947-1FAFF 1FC00-1FFFD"""
PICTURE = "[" + "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in PICTURES.split()) + "]"
EMOJI = rf"(?:(?:\p{{Emoji_Modifier_Base}}{TONES})?\p{{Emoji_Modifier}}{TONES}|{PICTURE}{TONES}\uFE0F?)"
TOKEN = regex.compile(
    rf"{JOINER}{{0,254}}{RUN}(?:{JOINER}+{RUN})*{JOINER}*"
    rf"|(?:\p{{Line_Break=Complex_Context}}{MARKS})+"
    rf"|[\p{{Script=Han}}\p{{Script=Hiragana}}]{MARKS}"
    rf"|\u200D{{0,254}}{EMOJI}(?:\u200D*(?<=\u200D){EMOJI})*"
    rf"|[#*]{TONES}\uFE0F?\u20E3{TONES}"
    rf"|(?:\p{{WB=Regional_Indicator}}{MARKS}){{2}}",
    regex.VERSION1,
)


class SearchIndex:
    """An inverted index of documents, which it knows by their places in the given order."""

    def __init__(self, names: Sequence[str], texts: Iterable[str]):
        """Index one lower-cased text per name. Names are unique; their order settles ties between equal scores.

        Raises ValueError unless there are as many texts as names.
        """
        self._ids: dict[str, int] = {}    # of each term
        ids, frequencies, sizes, lengths = array("i"), array("f"), array("i"), array("q")
        for counts in _term_counts(texts, self._ids):
            ids.extend(counts)
            frequencies.extend(counts.values())
            sizes.append(len(counts))
            lengths.append(counts.total())
        if len(lengths) != len(names):
            raise ValueError(f"{len(names)} names for {len(lengths)} texts")
        self._filled = np.count_nonzero(lengths)    # documents with a term: Lucene counts no others
        self._rank = np.empty(len(names), np.int32)
        self._rank[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
        by_term = np.argsort(ids, kind="stable")
        self._starts = np.append(0, np.bincount(ids, minlength=len(self._ids)).cumsum())    # of each term's postings
        self._documents = np.repeat(np.arange(len(names), dtype=np.int32), sizes)[by_term]
        inverse_norms = _inverse_norms(np.asarray(lengths))[self._documents]
        self._saturation = ONE + np.asarray(frequencies)[by_term] * inverse_norms

    def search(self, query: str, k: int = 50) -> list[int]:
        """The indices of the at most k best documents that score above 0, best first; ties by name."""
        scores = self._scores(query)
        found = np.flatnonzero(scores > 0)
        if len(found) > k > 0:
            found = found[scores[found] >= np.partition(scores[found], -k)[-k]]
        return found[np.lexsort((self._rank[found], -scores[found]))][: max(k, 0)].tolist()

    def _scores(self, query: str) -> np.ndarray:
        """The BM25 score, in nats, of each document (float32)."""
        scores = np.zeros(len(self._rank))
        for term, count in Counter(search_terms(query)).items():
            if (t := self._ids.get(term)) is not None:
                postings = slice(self._starts[t], self._starts[t + 1])
                weight = np.float32(count) * self._idf(postings.stop - postings.start)
                scores[self._documents[postings]] += weight - weight / self._saturation[postings]
        return scores.astype(np.float32)    # Lucene adds in 64 bits and compares in 32

    def _idf(self, df: int) -> np.float32:
        """The inverse document frequency, in nats, of a term that df documents hold."""
        return np.float32(math.log(1 + (self._filled - df + 0.5) / (df + 0.5)))


def search_terms(text: str) -> list[str]:
    """A text's index terms in order, with repeats: its words but for stop words, lower-cased and stemmed, as Lucene's
    English analyzer has them."""
    return list(chain.from_iterable(map(_analysed, _lucene_tokens(text))))


def lucene_lengths(lengths: np.ndarray) -> np.ndarray:
    """Document lengths (terms; integers of any shape) as Lucene's one-byte norms give them back: 4 significant bits of
    what exceeds 24."""
    excess = np.maximum(lengths - EXACT_LENGTHS, 0)
    dropped = np.maximum(np.frexp(excess)[1] - 4, 0)    # frexp's exponent is the number of bits
    return np.minimum(lengths, EXACT_LENGTHS) + (excess >> dropped << dropped)


def _inverse_norms(lengths: np.ndarray) -> np.ndarray:
    """1 / (k1 (1 - b + b length / mean)) of each document (float32), rounded step by step in Lucene's order."""
    mean = np.float32(max(lengths.sum(), 1) / max(np.count_nonzero(lengths), 1))
    return ONE / (K1 * ((ONE - B) + B * lucene_lengths(lengths).astype(np.float32) / mean))


def _term_counts(texts: Iterable[str], ids: dict[str, int]) -> Iterator[Counter[int]]:
    """How often each text holds each term, by term id. Terms not in ids are added; a token is analysed only once."""

    @cache
    def ids_of(token: str) -> tuple[int, ...]:
        return tuple(ids.setdefault(term, len(ids)) for term in _analysed(token))

    for text in texts:
        yield Counter(chain.from_iterable(map(ids_of, _lucene_tokens(text))))


def _lucene_tokens(text: str) -> list[str]:
    """Lucene's tokens of a text, those longer than its window still whole."""
    if text.isascii():
        return ASCII_TOKEN.findall(text)
    # No token holds a space, and most words of most texts can take the fast pattern.
    return [token for part in text.split(" ") for token in (ASCII_TOKEN if part.isascii() else TOKEN).findall(part)]


def _analysed(token: str) -> list[str]:
    """The terms of one token: none of a stop word, several of an overlong token, else one."""
    words = map(_lowered, [token] if len(token) <= WINDOW else _windows(token))
    return [_stem()(word) if word.endswith(STEMMED) else word for word in words if word not in STOP_WORDS]


def _lowered(word: str) -> str:
    """The word in lower case without its possessive 's; each character by itself, as Java does (no final sigma)."""
    word = word[:-2] if word[-2:-1] in ("'", "\u2019", "\uff07") and word[-1] in "sS" else word
    return word.lower() if word.isascii() else "".join(character.lower()[0] for character in word)


def _windows(token: str) -> Iterator[str]:
    """The tokens that Lucene finds in an overlong one, each the longest that ends within a window from its start."""
    start = 0
    while start < len(token):
        match = TOKEN.match(token, start, start + WINDOW)
        if match:
            yield match[0]
        start = match.end() if match else start + 1


@cache
def _stem() -> Callable[[str], str]:
    """Porter's stemmer with the author's two later rules, bli -> ble and logi -> log, which Lucene has too."""
    from nltk.stem.porter import PorterStemmer  # here, because the import takes 0.3 s

    return PorterStemmer(PorterStemmer.MARTIN_EXTENSIONS).stem


# ---- 10. WebShop: products, goals and their score ------------------------------------------------------------
#
# WebShop (Yao et al. 2022, arXiv 2207.01206) without Flask, Lucene or spaCy. One `Shop` holds what never changes; a
# shopper's state is one small tuple (`Page`). Observations, action lists, search results and scores are the original's.

SHOP_SEED = 233         # the original's seed for the order of its goals; here also for prices drawn from a range, so that
                        # all processes agree on the goals. The original draws prices unseeded, and the GiGPO release
                        # shuffles anew in every worker, which lets goals of its test panel into training.
SHOP_SPLITS = {         # [first, last) goal: the original's split, and that of the GiGPO release (no separate test)
    "original": {"train": (1500, None), "validation": (500, 1500), "test": (0, 500)},
    "release": {"train": (500, None), "validation": (0, 500), "test": (0, 500)},
}
COLOURS = tuple("""alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy
    camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream
    crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo
    ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor
    mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire
    seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white
    wine yellow""".split())                         # in the original's order: the first that occurs is taken
CLOSED_CLASS = frozenset("""a about above across after against all along also am among an and any are around as at be
    because been before behind below beneath beside between beyond both but by can could did do does down during each
    either every few for from had has have he her here hers him his how i if in inside into is it its just like many may
    me might more most much must my near neither no nor not of off on once one only onto or other our out outside over own
    per same shall she should so some such than that the their them then there these they this those through to too toward
    two under until up upon us very via was we were what when where which while who whose why will with within without
    would yes you your""".split())


@dataclass(frozen=True)
class Product:
    """One article of the catalogue, as the pages show it and as the score compares it."""
    asin: str
    name: str
    category: str
    query: str                                      # the search that the article was collected with
    crumbs: frozenset[str]                          # its places in the tree of categories
    price: float                                    # dollars; drawn from the range where the shop gives one
    price_tag: str
    description: str
    bullets: tuple[str, ...]
    options: dict[str, tuple[str, ...]]             # option name -> values
    attributes: tuple[str, ...]                     # hidden: what the score knows about the article


@dataclass(frozen=True)
class Goal:
    """What a shopper is asked to buy, for at most `price_upper` dollars (1e6: no limit). `options` are (name, value)
    pairs, or values alone where a human goal comes without the names."""
    product: Product
    text: str
    attributes: tuple[str, ...]
    options: tuple[Any, ...]
    price_upper: float


class Score(NamedTuple):
    """WebShop's reward of a purchase with all its terms. Its `total` is the score of a `State`."""
    attributes: tuple[str, ...]     # attributes asked for that the product has
    options: tuple[Any, ...]        # options asked for that were chosen
    price: bool                     # not above the limit
    wanted: int                     # |attributes| + |options| + 1, all that was asked for
    type: float                     # r_type: 1, .5, .1 or 0
    query_match: bool
    category_match: bool
    title_overlap: float            # share of the nouns of the goal's title that the product's title has

    @property
    def total(self) -> float:
        """(n_attributes + n_options + price) / wanted * type, in [0, 1]."""
        return (len(self.attributes) + len(self.options) + self.price) / self.wanted * self.type


def find_tagger() -> str:
    """The English spaCy model that is installed, or "stop-list". No model comes with this program."""
    names = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm")      # the original has lg, the GiGPO release sm
    return next(filter(find_spec, names if find_spec("spacy") else ()), "stop-list")


@lru_cache(maxsize=1)
def _pipeline(name: str) -> Any:
    import spacy
    return spacy.load(name, disable=["parser", "ner", "lemmatizer"])


@lru_cache(maxsize=1 << 16)
def title_nouns(title: str, tagger: str) -> tuple[str, ...]:
    """Nouns of a title, lower-cased: spaCy's, or with "stop-list" every word but those of the closed classes.

    A model that is not installed raises OSError, and without spaCy ImportError.

    >>> title_nouns("The Kettle for My Desk", "stop-list")
    ('kettle', 'desk')
    """
    if tagger == "stop-list":
        return tuple(w for w in re.findall(r"[^\W\d_]+", title.lower()) if w not in CLOSED_CLASS)
    return tuple(token.text.lower() for token in _pipeline(tagger)(title) if token.pos_ in ("NOUN", "PROPN"))


def _alike(a: Any, b: Any) -> bool:
    """thefuzz's token_set_ratio above 85, with the clean-up that it does first."""
    from rapidfuzz import fuzz, utils
    clean = lambda x: utils.default_process(str(x).translate(_NOT_ASCII))
    return round(fuzz.token_set_ratio(clean(a), clean(b))) > 85


_NOT_ASCII = dict.fromkeys(range(128, 256))


def _colour(option: Any) -> Any:
    """The first colour word in an option, else the option. In text it may be anywhere ("rectangular" holds "tan"); of a
    pair it must be a whole member: the original passes pairs for synthetic goals, which some then cannot meet."""
    return next((c for c in COLOURS if c in option), option)


def purchase_score(product: Product, chosen: Sequence[str], goal: Goal, tagger: str) -> Score:
    """WebShop's reward (arXiv 2207.01206) for buying `product` with the option values `chosen`.

    `tagger`, and what one that is not installed raises, as in `title_nouns`.
    """
    text = [product.name.lower(), " ".join(product.bullets).lower(), product.description.lower()]
    attributes = tuple(a for a in goal.attributes
                       if any(_alike(own, a) for own in product.attributes) or any(a in t for t in text))
    bought = [_colour(value) for value in chosen]
    options = tuple(o for o in goal.options if any(_alike(value, _colour(o)) for value in bought))
    mine, asked = title_nouns(product.name, tagger), title_nouns(goal.product.name, tagger)
    overlap = len(set(mine) & set(asked)) / len(asked) if asked else 0.2
    query, category = product.query == goal.product.query, len(product.crumbs & goal.product.crumbs) >= 2
    kind = 1.0 if query or category or overlap > 0.2 else 0.5
    kind = 0.0 if overlap == 0 else 0.1 if overlap < 0.1 else kind
    return Score(attributes, options, product.price <= goal.price_upper, len(goal.attributes) + len(goal.options) + 1,
                 kind, query, category, overlap)


class Shop:
    """A catalogue with its search engine and goals. Immutable, and shared by all environments of a process."""

    def __init__(self, items: Sequence[Mapping], instructions: Mapping, human: Mapping | None = None, *,
                 tagger: str = "auto", source: str = "items"):
        """From the contents of the original's files: `items_shuffle`, `items_ins_v2`, and for human goals `items_human_ins`.
        Raises ValueError naming file, product and field of what is missing or malformed, or the tagger that is not installed.
        As in the original, a product whose asin is "nan", over 10 characters or taken is left out."""
        self.tagger = find_tagger() if tagger == "auto" else tagger
        try:
            if "lamp" not in title_nouns("A red lamp", self.tagger):
                raise ValueError("it finds no nouns")
        except Exception as error:              # a name that is no model may be any module
            raise ValueError(f"{self.tagger!r} is not an installed spaCy model that tags nouns ({error}); give the name of one, "
                             "or --webshop-tagger stop-list") from error
        rng = random.Random(SHOP_SEED)
        self.products: dict[str, Product] = {}
        for n, item in enumerate(items):
            asin = item.get("asin") if isinstance(item, Mapping) else None
            if not (isinstance(asin, str) and (asin == "nan" or len(asin) > 10 or asin in self.products)):
                product = _product(item, n, instructions, rng, source)
                self.products[product.asin] = product
        if not self.products:
            raise ValueError(f"{source}: the catalogue is empty; get WebShop's data again")
        goals = list(_human_goals(self.products, human, rng) if human is not None
                     else _synthetic_goals(self.products, instructions, rng))
        random.Random(SHOP_SEED).shuffle(goals)
        self.goals: tuple[Goal, ...] = tuple(goals)
        self.asins = list(self.products)
        self.index = SearchIndex(self.asins, map(_indexed_text, self.products.values()))
        self.search = lru_cache(maxsize=4096)(self._search)

    def _search(self, query: str) -> tuple[str, ...]:
        """The asins of the best 50 products, best first."""
        return tuple(self.asins[i] for i in self.index.search(query, 50))

    @classmethod
    def load(cls, folder: str | Path, *, size: str = "small", goals: str = "synthetic", tagger: str = "auto") -> Shop:
        """The original's files in `folder`: size "small" (the first 1,000 products) or "full", goals "synthetic"
        or "human". Raises ValueError for another size or goals, naming the file for one that is missing or not JSON, and
        what `Shop()` raises."""
        if size not in ("small", "full") or goals not in ("synthetic", "human"):
            raise ValueError(f"size {size!r} or goals {goals!r} are unknown; there are: small, full; synthetic, human")
        tail = "_1000" if size == "small" else ""
        names = [f"items_shuffle{tail}.json", f"items_ins_v2{tail}.json"] + ["items_human_ins.json"] * (goals == "human")
        loaded = []
        for name, kind in zip(names, (list, dict, dict)):
            path = Path(folder) / name
            try:
                if (file := Path(os.path.expanduser(path))).exists() and not file.is_file():
                    raise OSError("is no file")
                loaded.append(json.loads(file.read_bytes()))
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"{path}: cannot be read as JSON ({error}); give the folder with WebShop's data files "
                                 "(--webshop-data), and --webshop-size small or full as they are") from error
            if not isinstance(loaded[-1], kind):
                raise ValueError(f"{path}: holds a {type(loaded[-1]).__name__}, not a {kind.__name__}; get it again")
        return cls(*loaded, tagger=tagger, source=str(Path(folder) / names[0]))

    @classmethod
    def generated(cls, seed: int = 0, products: int = 1000, *, tagger: str = "auto") -> Shop:
        """A made-up catalogue in the same format; raises what `generate_catalogue` and `Shop()` raise."""
        return cls(*generate_catalogue(seed, products), tagger=tagger, source=f"generated catalogue {seed}")


def _product(item: Mapping, n: int, instructions: Mapping, rng: random.Random, source: str) -> Product:
    """One entry of `items_shuffle`, checked."""
    def bad(field: str, problem: str) -> ValueError:
        return ValueError(f"{source}: product {n} ({item.get('asin', '?')}): field {field!r} {problem}")

    if not isinstance(item, Mapping):
        raise ValueError(f"{source}: product {n} is {type(item).__name__}, not an object")
    texts = {}
    for name in ("asin", "name", "category", "query", "product_category", "full_description"):
        if not isinstance(item.get(name), str) and not (name == "full_description" and name in item and item[name] is None):
            raise bad(name, "is missing" if name not in item else f"is {item[name]!r}, not text")
        texts[name] = item[name] or ""
    for name in ("small_description", "customization_options"):
        if name not in item:
            raise bad(name, "is missing")
    bullets = item["small_description"]
    bullets = [bullets] if isinstance(bullets, str) else bullets or []
    if not _texts(bullets):
        raise bad("small_description", "is not a list of texts")
    try:
        tags = item["pricing"].split("$")[1:] if item.get("pricing") else ["100"]
        prices = [float(Decimal(re.sub(r"[^\d.]", "", tag))) for tag in tags]
        price_tag = f"${prices[0]}" + (f" to ${prices[1]}" if len(prices) > 1 else "")
    except (AttributeError, ArithmeticError, IndexError) as error:
        raise bad("pricing", f"is {item['pricing']!r}, not a price such as $12.50") from error
    try:
        options = {name.lower(): tuple(v["value"].strip().replace("/", " | ").lower() for v in values)
                   for name, values in (item["customization_options"] or {}).items() if values is not None}
    except (AttributeError, KeyError, TypeError) as error:
        raise bad("customization_options", "is not of the form {name: [{\"value\": text}, ...]}") from error
    entry = instructions.get(texts["asin"], {})
    attributes: Any = entry.get("attributes", ["DUMMY_ATTR"]) if isinstance(entry, Mapping) else None
    if not _texts(attributes):
        raise bad("attributes", "(in items_ins_v2) is not a list of texts")
    price = prices[0] if len(prices) == 1 else rng.uniform(*prices[:2])
    return Product(texts["asin"], texts["name"], texts["category"], texts["query"].lower().strip(),
                   frozenset(c.strip() for c in texts["product_category"].split("›")), price, price_tag,
                   texts["full_description"], tuple(bullets), options, tuple(attributes))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _indexed_text(product: Product) -> str:
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product.options.items())
    return " ".join((product.name, product.description, product.bullets[0] if product.bullets else "", options)).lower()


def _price_limit(product: Product, rng: random.Random) -> tuple[float, str]:
    """The larger of two draws from the next four $10 steps above the price, and its words."""
    steps = [10.0 * i for i in range(1, 100) if 10.0 * i > product.price][:4]
    if len(steps) < 2:
        return 1e6, ""
    upper = max(rng.sample(steps, 2))
    return upper, f", and price lower than {upper:.2f} dollars"


def _synthetic_goals(products: Mapping[str, Product], instructions: Mapping, rng: random.Random) -> Iterator[Goal]:
    """One goal for every combination of a product's options."""
    for asin, product in products.items():
        entry = instructions.get(asin, {})
        if entry.get("instruction") is None:
            continue
        text, attributes = entry["instruction"], entry.get("instruction_attributes")
        if not isinstance(text, str) or not _texts(attributes) or not attributes:
            field = "instruction_attributes" if isinstance(text, str) else "instruction"
            raise ValueError(f"items_ins_v2: product {asin}: field {field!r} is {entry.get(field)!r}, not "
                             f"{'a list of texts' if isinstance(text, str) else 'text'}")
        upper, limit = _price_limit(product, rng)
        names = sorted(product.options)
        if (count := math.prod(map(len, product.options.values()))) > MOST_COMBINATIONS:
            raise ValueError(f"product {asin} has {count:,} combinations of options, and each would be a goal (at most "
                             f"{MOST_COMBINATIONS:,}); take it out")
        for values in itertools.product(*(product.options[name] for name in names)):
            pairs = tuple(zip(names, values))
            wish = ", and ".join(f"{name}: {value}" for name, value in pairs)
            yield Goal(product, f"{text}{f' with {wish}' if wish else ''}{limit}", tuple(attributes), pairs, upper)


def _human_goals(products: Mapping[str, Product], human: Mapping, rng: random.Random) -> Iterator[Goal]:
    """One goal for every instruction that names an attribute."""
    for asin, product in products.items():
        entries = human.get(asin, [])
        if not isinstance(entries, list):
            raise ValueError(f"items_human_ins: product {asin} is {entries!r}, not a list of instructions")
        for n, entry in enumerate(entries):
            fields: dict[str, Any] = {name: entry.get(name) if isinstance(entry, Mapping) else None
                                      for name in ("instruction", "instruction_attributes", "instruction_options")}
            options = fields["instruction_options"]
            if isinstance(options, Mapping):                # by name; in other files the values alone
                fields["instruction_options"] = list(options.values())
            for name, value in fields.items():
                if not (isinstance(value, str) if name == "instruction" else _texts(value)):
                    raise ValueError(f"items_human_ins: product {asin}, instruction {n}: field {name!r} is {value!r}")
            text, attributes, values = fields.values()
            if attributes:
                upper, limit = _price_limit(product, rng)
                options = tuple(options.items()) if isinstance(options, Mapping) else tuple(values)
                yield Goal(product, text.strip(".") + limit, tuple(attributes), options, upper)


# ---- 11. WebShop: pages --------------------------------------------------------------------------------------

MOST_COMBINATIONS = 100_000                         # of a product's options


class Page(NamedTuple):
    """Where a shopper is. All that changes during an episode."""
    kind: str = "search"                            # search, results, item, description, features, reviews or done
    query: str = ""
    number: int = 1                                 # page of the results
    asin: str = ""
    chosen: tuple[tuple[str, str], ...] = ()        # (option, value), in the order of the first click
    seen: frozenset[str] = frozenset()              # products opened since the search page
    score: Score | None = None                      # of the purchase


def _nodes(shop: Shop, goal: Goal, page: Page) -> Iterator[tuple[str, str]]:
    """The visible texts of a page in order, each with what it is: text, button, product or option."""
    if page.kind == "done":
        chosen = json.dumps(dict(page.chosen), sort_keys=True)
        for char in "<>&'":                                         # as the original's template writes JSON
            chosen = chosen.replace(char, f"\\u{ord(char):04x}")
        yield from ((t, "text") for t in (
            "Thank you for shopping with us!", "Your code: ", "None", " (Paste it in your MTurk interface.)", "Purchased",
            "asin", page.asin, "options", chosen, "attrs", "None", "category", "None", "query", "None", "product category",
            "None", "Target", "asin", "options", "attrs", "price upper", "instuction text", "category", "product category",
            "query", "Goal ", "None", "Reward", "Your score (min 0.0, max 1.0)", str(page.score and page.score.total),
            "Reward Details ", "None"))
        return
    if page.kind == "search":
        yield from (("WebShop", "text"), ("Instruction: ", "text"), (goal.text, "text"), ("Search", "button"))
        return
    yield from (("Instruction:", "text"), (goal.text, "text"), ("Back to Search", "button"))
    if page.kind == "results":
        found = shop.search(page.query)
        yield f"Page {page.number} (Total results: {len(found)})", "text"
        if page.number > 1:
            yield "< Prev", "button"
        yield "Next >", "button"
        for asin in found[10 * page.number - 10:10 * page.number]:
            yield from ((asin, "product"), (shop.products[asin].name, "text"), (shop.products[asin].price_tag, "text"))
        return
    product = shop.products[page.asin]
    yield "< Prev", "button"
    if page.kind == "description":
        yield product.description, "text"
    elif page.kind == "features":
        yield from ((" " + bullet, "text") for bullet in product.bullets)
    elif page.kind == "item":
        for name, values in product.options.items():
            yield name, "text"
            yield from ((value, "option") for value in values)
        yield from ((product.name, "text"), (f"Price: {product.price_tag}", "text"), ("Rating: N.A.", "text"))
        yield from ((name, "button") for name in ("Description", "Features", "Reviews", "Buy Now"))


def _plain_text(nodes: Sequence[tuple[str, str]]) -> str:
    """Observation mode `text`."""
    return " [SEP] ".join(text.strip() for text, _ in nodes if text)


def _rich_text(nodes: Sequence[tuple[str, str]], page: Page) -> str:
    """Observation mode `text_rich`: buttons are marked, and so is what was clicked."""
    # The original looks for an option in quotes in the page's whole address, which holds the query, too.
    lines, address = [], f"{page.asin}/{page.query.replace(' ', '+')}/{page.number}/{json.dumps(dict(page.chosen))}"
    for text, kind in nodes:
        clicked = f'"{text}"' in address if kind == "option" else text in page.seen
        mark = "clicked button" if clicked else "button"
        if kind == "text":
            lines += [text] if text else []
        elif kind == "button":
            lines.append(f"[button] {text} [button_]")
        else:
            lines.append(f"{'  ' if kind == 'option' else chr(10)}[{mark}] {text} [{mark}_]")
        if kind == "option" and clicked:
            lines.insert(0, f"You have clicked {text}.")
    return "\n".join(lines) + "\n"


class ShopGame(AbstractContextManager):
    """One goal in a shop. `start` and every later `State` can be stepped from again, in any order."""

    def __init__(self, env: WebShop, task: Task) -> None:
        self.env, self.task, self.goal = env, task, task.data
        self.start = self._state(Page())

    def step(self, state: State, action: str) -> State:
        """The state after `search[words]` (from any page) or `click[what the page offers]`; anything else changes
        nothing and is marked invalid.

        The episode ends at the purchase, whose score is WebShop's reward, or after `max_steps` actions. A state that is
        done raises ValueError.
        """
        if state.done:
            raise ValueError(f"{self.task.id}: the episode ended after {state.steps} steps; step another state")
        match = re.match(r"(.+)\[(.+)\]", action)
        verb, argument = (match[1], match[2].lower()) if match else (action, "")
        page, valid = state.engine, True
        # An answer has single blanks (`parse_action`); some options don't: "Black / White" is `black  |  white`.
        clicks = {" ".join(a.split()): a for a in reversed(state.admissible)} | {a: a for a in state.admissible}
        if verb == "search" and argument:
            page = page._replace(kind="results", query=argument, number=1, asin="", chosen=())
        elif verb == "click" and f"click[{argument}]" in clicks:
            page = self._click(page, clicks[f"click[{argument}]"][len("click["):-1])
        else:
            valid = False
        return self._state(page, steps=state.steps + 1, valid=valid)

    def _click(self, page: Page, what: str) -> Page:
        """The page behind a button, a product or an option, looked up in this order, as the original does."""
        if what == "search":                        # the original lists the search button, but to click it does nothing
            return page
        if what == "buy now":
            product, values = self.env.shop.products[page.asin], [value for _, value in page.chosen]
            return page._replace(kind="done", score=purchase_score(product, values, self.goal, self.env.shop.tagger))
        if what == "back to search":
            return Page()
        if what in ("next >", "< prev") and page.kind == "results":
            return page._replace(number=page.number + (1 if what == "next >" else -1))
        if what == "< prev":
            return page._replace(kind="results", asin="", chosen=()) if page.kind == "item" else page._replace(kind="item")
        if what in ("description", "features", "reviews"):
            return page._replace(kind=what)
        if page.kind == "results":
            asin = next(a for a in self.env.shop.search(page.query) if a.lower() == what)
            return page._replace(kind="item", asin=asin, seen=page.seen | {asin})
        options = self.env.shop.products[page.asin].options
        name = [name for name, values in options.items() if what in values][-1]     # the last group that has the value
        return page._replace(chosen=tuple({**dict(page.chosen), name: what}.items()))

    def _state(self, page: Page, steps: int = 0, valid: bool = True) -> State:
        nodes = list(_nodes(self.env.shop, self.goal, page))
        text = _plain_text(nodes) if self.env.observation == "text" else _rich_text(nodes, page)
        offered = [t.lower() for kinds in (("button",), ("product",), ("option",)) for t, kind in nodes if kind in kinds]
        actions = ["search[<your query>]"] * (page.kind == "search") + [f"click[{t}]" for t in dict.fromkeys(offered)]
        score = page.score.total if page.score else 0.0
        return State(text, tuple(actions), anchor=f"{text}\n{sorted(page.chosen)}", reward=SUCCESS_REWARD if score == 1 else 0.0,
                     done=page.kind == "done" or steps >= self.env.max_steps, success=score == 1, steps=steps, valid=valid,
                     score=score, engine=page)

    def close(self) -> None:
        """Nothing to give back: games share one immutable shop."""

    def __exit__(self, *_: object) -> None:
        self.close()


class WebShop:
    """Shopping goals in one shop. A task's type is its product's category.

    `what` names the data in the notice, `observation` is "text" or "text_rich", `split` one of SHOP_SPLITS. A training
    goal that reads as one held out for test or validation is left out, and the notice counts them. Raises ValueError for
    another `observation` or `split`, and if the shop has too few goals for the split.
    """
    name, scored, success_reward = "webshop", True, SUCCESS_REWARD

    def __init__(self, shop: Shop, what: str, *, max_steps: int = 15, observation: str = "text",
                 split: str = "original") -> None:
        if observation not in ("text", "text_rich") or split not in SHOP_SPLITS:
            raise ValueError(f"observation {observation!r} or split {split!r} is unknown; there are: text, text_rich; "
                             f"{', '.join(SHOP_SPLITS)}")
        self.shop, self.max_steps, self.observation = shop, max_steps, observation
        start = SHOP_SPLITS[split]["train"][0]
        held_out = {goal.text for goal in shop.goals[:start]}
        repeated = {i for i, goal in enumerate(shop.goals[start:], start) if goal.text in held_out}
        self.splits = {}
        for name, (first, last) in SHOP_SPLITS[split].items():
            self.splits[name] = [Task(f"{name}/{i}-{goal.product.asin}", goal.product.category, goal.text, name, goal)
                                 for i, goal in enumerate(shop.goals[first:last], first) if i not in repeated]
            if not self.splits[name]:
                repeats = f", {len(repeated)} of them left out as they repeat others," if repeated else ""
                raise ValueError(f"{len(shop.goals)} goals{repeats} are too few for the {split} split ({name} begins at goal "
                                 f"{first})")
        counts = ", ".join(f"{name} {len(tasks)}" for name, tasks in self.splits.items())
        counts += f" ({len(repeated)} more read as one held out)" if repeated else ""
        nouns = "a stop-list, as no spaCy model is installed" if shop.tagger == "stop-list" else f"spaCy's {shop.tagger}"
        self.notice = f"WebShop: {what}, {len(shop.products)} products, goals: {counts}; title nouns by {nouns}."

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of "train", "validation" or "test"; another split raises KeyError."""
        return self.splits[split]

    def open(self, task: Task) -> ShopGame:
        """The task's game. Raises ValueError for a task that is not a goal of this shop."""
        if not isinstance(task.data, Goal) or self.shop.products.get(task.data.product.asin) is not task.data.product:
            raise ValueError(f"{task.id} is not a goal of this shop; take tasks from .tasks(split)")
        return ShopGame(self, task)


def make_shop(data: str, compact: bool, max_steps: int, seed: int, *, size: str = "small", goals: str = "synthetic",
              split: str = "original", observation: str = "text", tagger: str = "auto") -> WebShop:
    """WebShop with the data files in `data`, else with a made-up catalogue: 450 products (compact) or 1,000.

    `size` and `goals` as in `Shop.load`, `split` and `observation` as in `WebShop`; raises what these two raise.
    """
    if data:
        shop = Shop.load(data, size=size, goals=goals, tagger=tagger)
        what = f"the original files in {data} ({size}, {goals} goals)"
    else:
        shop = Shop.generated(seed, 450 if compact else 1000, tagger=tagger)
        what = f"{'small ' if compact else ''}GENERATED catalogue {seed} (scores are not WebShop benchmark scores)"
    try:
        return WebShop(shop, what, max_steps=max_steps, observation=observation, split=split)
    except ValueError as error:
        ways = [f"--webshop-{name} {value}" for name, value, given in (
            ("split", "release", split), ("size", "full", size if data else "full"),
            ("goals", "synthetic", goals if data else "synthetic")) if value != given]
        raise ValueError(f"{error}; use {' or '.join(ways) or 'data with more products'}") from error


# ---- 12. WebShop: a made-up catalogue ------------------------------------------------------------------------

BRANDS = "acme cedar ember haven lotus nova solis zephyr".split()
QUALITIES = """adjustable antique certified compact durable foldable handmade imported lightweight magnetic modern organic
    padded portable quilted recycled reusable reversible rustic scented sturdy vegan washable waterproof""".split()
DEPARTMENTS = {     # category: its place in the tree of categories, its articles
    "beauty": ("Beauty & Personal Care › Daily Care",
               "brush comb lotion mirror perfume razor shampoo soap towel".split()),
    "electronics": ("Electronics › Portable Devices",
                    "camera charger clock headset keyboard monitor radio speaker tablet".split()),
    "fashion": ("Clothing, Shoes & Jewelry › Everyday", "belt boots coat gloves hat jacket scarf shirt skirt".split()),
    "furniture": ("Home & Kitchen › Furniture", "bed bench chair desk lamp rug shelf sofa stool".split()),
    "kitchen": ("Home & Kitchen › Kitchen & Dining", "bowl fork kettle knife mug pan plate spoon tray".split()),
}
SHADES = "black blue green grey pink red white yellow".split()
SIZES = "small medium large huge".split()


def shop_habits(rng: random.Random) -> dict[str, str]:
    """The brand that usually makes a thing waterproof, foldable and so on: the first that is drawn for a shop, by
    `random.Random("shop/0")`."""
    return dict(zip(rng.sample(QUALITIES, 12), rng.sample(BRANDS, 4) * 3))


def generate_catalogue(seed: int = 0, products: int = 1000, *, loyalty: float = 0.95) -> tuple[list[dict], dict]:
    """A catalogue in the format of `items_shuffle` and `items_ins_v2`, both returned, drawn from `seed`.

    Ten near-duplicates of every article: one from each of eight brands; of one of them a twin that is too dear or comes in
    other colours; of another a lure that lacks its qualities and names the article, and every colour and size, often enough
    to be found first. They differ in a quality (waterproof, ...) that only the Features page tells and that the search engine
    doesn't index. A shop has habits: four of the brands make things special, each in three ways; `habit[quality]` is the one
    that makes them so, for each article with probability `loyalty`. So reading pays, and so does experience: it tells which
    brands are worth a look at all, and then which one for what.
    """
    rng = random.Random(f"shop/{seed}")
    habit = shop_habits(rng)
    articles = [(category, crumbs, name) for category, (crumbs, names) in DEPARTMENTS.items() for name in names]
    families = -(-products // 10)
    items: list[dict[str, Any]] = []
    instructions: dict[str, dict[str, Any]] = {}

    def put(brand: str, number: int, price: int, colours: list[str], sizes: list[str], features: list[str],
            more: str = "") -> None:
        asin = f"{brand}{10 + number}".upper()
        items.append(dict(
            asin=asin, name=f"{brand} {name}".title(), category=category, query=name,
            product_category=f"{crumbs} › {name.title()}", pricing=f"${price}.00",
            full_description=f"A {name} by {brand}{more}.", small_description=["For every day", *features], images=[""],
            customization_options={"color": [{"value": c} for c in colours], "size": [{"value": s} for s in sizes]}))
        instructions[asin] = dict(attributes=features or ["plain"])
        if features:
            wish = rng.choice(features)
            instructions[asin] |= dict(instruction=f"find me {wish} {name}", instruction_attributes=[wish])

    for n in range(families):
        category, crumbs, name = articles[n % len(articles)]
        name += f" series {n // len(articles) + 1}" if n >= len(articles) else ""
        features = defaultdict(list)
        for quality, usual in habit.items():
            features[usual if rng.random() < loyalty else rng.choice(BRANDS)].append(quality)
        base, (twin, lure) = rng.randint(10, 40), rng.sample(BRANDS, 2)
        for brand in BRANDS:
            price, colours = base + rng.randint(0, 15), rng.sample(SHADES, 3)
            sizes = sorted(rng.sample(SIZES, 3), key=SIZES.index)
            put(brand, n, price, colours, sizes, features[brand])
            if brand == twin and rng.random() < 0.5:        # above any limit that a goal for the first one can have
                put(brand, n + families, price + 44, colours, sizes, features[brand])
            elif brand == twin:
                put(brand, n + families, price, [c for c in SHADES if c not in colours][:3], sizes, features[brand])
            if brand == lure:
                put(brand, n + 2 * families, price, colours, sizes, [], " ".join(["", *[name] * 3, *SHADES, *SIZES]))
    return items[:products], {item["asin"]: instructions[item["asin"]] for item in items[:products]}
