"""Environments: text tasks that a policy plays, one state in and one state out.

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
import dataclasses
import io
import json
import os
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, Mapping, NamedTuple, Protocol, Sequence

# ---- 1. The protocol ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One game or shopping goal. `id` is unique and stable, `kind` the task type that results are grouped by."""
    id: str
    kind: str
    goal: str                       # the sentence that the policy is given
    split: str                      # "train", "valid_seen" or "valid_unseen"
    data: Any = field(default=None, repr=False, compare=False)   # what the environment needs to open it


@dataclass(frozen=True)
class State:
    """What a rollout is in after `steps` actions. Immutable; `engine` belongs to the environment."""
    observation: str                # text shown to the policy
    admissible: tuple[str, ...]     # commands that the environment accepts now
    anchor: str                     # equal anchors are the same anchor state (G3)
    reward: float = 0.0             # reward of the action that led here
    done: bool = False
    success: bool = False
    steps: int = 0                  # actions taken so far
    valid: bool = True              # the action that led here was admitted
    engine: Any = field(default=None, repr=False, compare=False)


class Game(Protocol):
    """One task, opened. All rollouts of a group play the same `Game`."""
    task: Task
    start: State

    def step(self, state: State, action: str) -> State: ...
    def close(self) -> None: ...


class Environment(Protocol):
    """A benchmark: tasks by split, and games to play them in."""
    name: str
    max_steps: int
    notice: str                     # the first line of output: which data this is

    def tasks(self, split: str) -> Sequence[Task]: ...
    def open(self, task: Task) -> Game: ...


# ---- 2. What the policy reads and writes -------------------------------------------------------------------

PROMPTS = {
    "full": """You are acting in a household simulated in text. Your task: {goal}
{skill}{history}Step {step}. You now observe: {observation}
You can take one of these actions: [{actions}]
First reason about the situation inside <think> </think>, then give exactly one of the listed actions inside <action> </action>.""",
    "compact": """{history}now {step} : {observation}
can : {actions}
{skill}task : {goal}""",
}


class Turn(NamedTuple):
    observation: str
    action: str


def render_prompt(goal: str, state: State, history: Sequence[Turn], *, skill: str | None = None,
                  style: str = "full", window: int = 2) -> str:
    """The user turn of one step: task, last `window` observation-action pairs, observation, admissible actions."""
    recent = list(history)[-window:] if window else []
    observation = state.observation
    if style == "full":
        past = "".join(f"[Observation {len(history) - len(recent) + i + 1}: {t.observation} Action "
                       f"{len(history) - len(recent) + i + 1}: {t.action}]\n" for i, t in enumerate(recent))
        past = f"Your last {len(recent)} of {len(history)} steps:\n{past}" if recent else ""
        advice = f"Advice from your own experience, which may help: {skill}\n" if skill else ""
        actions = ", ".join(f"'{a}'" for a in state.admissible if a != "help")
    else:
        # The opening lists all receptacles, and so do the `go to` actions: the compact prompt says it once.
        brief = lambda text: text.partition(" Looking quickly around you")[0]
        observation = brief(observation)
        past = "".join(f"saw : {brief(t.observation)}\ndid : {t.action}\n" for t in recent)
        advice = f"skill : {skill}\n" if skill else ""
        actions = " ; ".join(a for a in state.admissible if a not in ("help", "inventory", "look")
                             and not a.startswith("examine"))
    return PROMPTS[style].format(goal=goal, history=past, step=state.steps + 1, observation=observation,
                                 actions=actions, skill=advice)


_ACTION = re.compile(r"<action>(.*?)</action>", re.S)


def parse_action(response: str) -> str | None:
    """The text of the first `<action>...</action>` after a `<think>...</think>`, lower-cased; None if there is none."""
    match = _ACTION.search(response)
    if match is None or "<think>" not in response or "</think>" not in response:
        return None
    return " ".join(match.group(1).lower().split()) or None


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

BANNER = "-= Welcome to TextWorld, ALFRED! =-\n\n"        # TextWorld's; it says nothing, so policies don't see it
STAND_IN = "UNKNOWN GOAL"                                 # as in the grammar that alfworld ships
Facts = dict[str, list[tuple[str, ...]]]                  # predicate -> its true argument tuples, sorted


@lru_cache(maxsize=1)
def _textworld() -> SimpleNamespace:
    """The parts of TextWorld that are used, imported late: they take a second."""
    if sys.version_info >= (3, 13):
        raise ImportError("TextWorld's PDDL engine does not run on Python 3.13 or newer; use Python 3.10 to 3.12")
    try:
        import fast_downward
        from fast_downward.translate.pddl.conditions import Atom
        from textworld.envs.pddl import logic, textgen
        from textworld.generator.game import EntityInfo
        from textworld.logic import Rule
        from alfworld.agents.utils.misc import Demangler
    except ImportError as error:
        raise ImportError(f"ALFWorld is not installed ({error}); run `pip install -r requirements.txt` (its Fast Downward is "
                          "compiled on the spot, which takes cmake, a C++ compiler and some minutes)") from error
    return SimpleNamespace(fd=fast_downward, Atom=Atom, logic=logic, textgen=textgen, EntityInfo=EntityInfo, Rule=Rule,
                           Demangler=Demangler)


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
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
    facts: dict[str, set[tuple[str, ...]]]
    types: dict[str, str]                           # object -> type
    supertypes: dict[str, set[str]]                 # type -> itself and its supertypes
    parameters: dict[str, list[tuple[str, str]]]    # action -> (variable, type)


@lru_cache(maxsize=256)
def _translate(domain: str, problem: str) -> _World:
    tw, argv, out = _textworld(), sys.argv, sys.stdout
    sys.stdout = io.StringIO()
    try:                                            # the translator rewrites sys.argv and prints
        task, sas = tw.fd.pddl2sas(domain, problem)
    except SystemExit as error:                     # how the translator reports bad PDDL
        raise ValueError(f"Fast Downward rejects its PDDL (exit {error.code})") from error
    finally:
        sys.argv, sys.stdout = argv, out
    facts: dict[str, set] = defaultdict(set)
    for atom in task.init:
        if isinstance(atom, tw.Atom) and atom.predicate != "=":
            facts[atom.predicate].add(tuple(atom.args))
    return _World(zlib.compress(sas.encode(), 1), dict(facts), {o.name: o.type_name for o in task.objects},
                  {t.name: {t.name, *t.supertype_names} for t in task.types},
                  {a.name: [(p.name.strip("?"), p.type_name) for p in a.parameters] for a in task.actions})


def _literal(name: str) -> tuple[str, tuple[str, ...]]:
    """Fast Downward's "Atom p(a, b)" as ("p", ("a", "b")), "NegatedAtom p(a)" as ("not_p", ("a",))."""
    sign, rest = name.split(" ", 1)
    predicate, arguments = rest[:-1].split("(", 1)
    return ("not_" if sign == "NegatedAtom" else "") + predicate, tuple(a for a in arguments.split(", ") if a)


class _Node:
    """One state of a household. `children` remembers the steps already taken from it."""
    __slots__ = ("id", "facts", "delta", "won", "commands", "admissible", "children")


class AlfEngine:
    """One Fast Downward library, one game at a time: `step` from any node, in any order."""

    def __init__(self) -> None:
        self.fd = _textworld().fd
        self.lib = self.fd.load_lib()

    def load(self, data: Mapping[str, Any]) -> None:
        self.world = _translate(data["pddl_domain"], data["pddl_problem"])
        self.logic, goal = _grammar(data["grammar"])
        self.lib.load_sas(zlib.decompress(self.world.sas))
        facts = defaultdict(set, {name: set(rows) for name, rows in self.world.facts.items()})
        atoms = (self.fd.Atom * self.lib.get_state_size())()
        self.lib.get_state(atoms)
        for predicate, arguments in map(_literal, (a.name for a in atoms)):
            if not predicate.startswith("not_"):
                facts[predicate].add(arguments)
        used = {a for rows in facts.values() for row in rows for a in row}
        self.entities = {name: _textworld().EntityInfo(name, self.world.types[name]) for name in used}
        demangler = _textworld().Demangler(game_infos=self.entities)
        for info in self.entities.values():
            info.name, info.definite, info.indefinite = demangler.demangle_alfred_name(info.id), "the", "a"
        self.nodes: dict[Any, _Node] = {}
        self.root = self._node({name: sorted(rows) for name, rows in facts.items()}, frozenset())
        self.intro = self._write("#intro#", self.root.facts, {}).replace(STAND_IN, goal)

    def step(self, node: _Node, command: str) -> tuple[_Node, str]:
        """The next node, and TextWorld's feedback."""
        command = command.strip()
        if command not in node.commands:
            return node, "Nothing happens."
        if command not in node.children:
            operator, count, action, binding = node.commands[command]
            self.lib.set_state_id(node.id)
            effects = (self.fd.Atom * count)()
            self.lib.apply_operator(operator, effects)
            facts, changed = dict(node.facts), set()
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
        for operator in {op.name: op for op in reversed(operators)}.values():
            action, *arguments = operator.name.split()
            binding = dict(zip(self.world.parameters[action], arguments))
            command = self._write(self.logic.actions[action].template, facts, binding)
            node.commands[command] = (operator.id, operator.nb_effect_atoms, action, binding)
        node.admissible = tuple(sorted(node.commands))
        return node

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


class AlfGame:
    """One game, opened on a borrowed engine. `start` and every later `State` can be stepped from again, in any order."""

    def __init__(self, env: "AlfWorld", task: Task, data: Mapping[str, Any]) -> None:
        self.env, self.engine = env, env.engines.pop() if env.engines else AlfEngine()
        try:
            self.engine.load(data)
        except BaseException:
            env.engines.append(self.engine)
            raise
        self.task = task
        self.start = self._state(self.engine.root, self.engine.intro.removeprefix(BANNER))

    def step(self, state: State, action: str) -> State:
        """The state after `action`. An inadmissible action is answered "Nothing happens." and marked invalid."""
        if state.done:
            raise ValueError(f"{self.task.id}: the episode ended after {state.steps} steps; step another state")
        node, text = self.engine.step(state.engine, action)
        steps = state.steps + 1
        return self._state(node, text, reward=10.0 if node.won else 0.0, done=node.won or steps >= self.env.max_steps,
                           success=node.won, steps=steps, valid=action.strip() in state.engine.commands)

    def _state(self, node: _Node, text: str, **outcome: Any) -> State:
        return State(text, node.admissible, anchor="\n".join((text, *node.admissible)), engine=node, **outcome)

    def close(self) -> None:
        """Give the engine back. Engines are never freed: a Fast Downward library can't be unloaded safely."""
        if self.engine is not None:
            self.engine.nodes.clear()
            _textworld_memory().clear()
            self.env.engines.append(self.engine)
            self.engine = None

    def __enter__(self) -> "AlfGame":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _textworld_memory() -> dict:
    """TextWorld remembers every variable and type it ever made (about a megabyte a game); cleared after each game."""
    from mementos import core
    return core._memento_cache


class AlfWorld:
    """Tasks by split, played on TextWorld. `AlfWorld.official(folder)` has the benchmark's games, `.generated(seed)` new
    ones on the official floor plans, `.household(seed)` small ones in a home with habits."""
    name = "alfworld"

    def __init__(self, notice: str, tasks: Mapping[str, Sequence[Task]], max_steps: int) -> None:
        self.notice, self.splits, self.max_steps = notice, tasks, max_steps
        self.engines: list[AlfEngine] = []          # free ones

    @classmethod
    def official(cls, data: str | Path, *, max_steps: int = 50) -> "AlfWorld":
        """The games that `alfworld-download` fetches. `data` is the folder `json_2.1.1` or the one around it.

        Like the official loader this leaves out sliced and movable objects and games not marked solvable. Raises
        ValueError for a folder without games, and for a split whose files are not games, naming what is wrong.
        """
        folder = Path(data).expanduser()
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
    def generated(cls, seed: int = 0, *, max_steps: int = 50) -> "AlfWorld":
        """New games in ALFWorld's format on the official floor plans, as many as the benchmark has."""
        notice = ("ALFWorld: GENERATED games (no data folder was given or found), played on TextWorld's engine. "
                  "Their scores are not ALFWorld benchmark scores.")
        return cls(notice, {split: GeneratedTasks(split, seed) for split in SPLIT_COUNTS}, max_steps)

    @classmethod
    def household(cls, seed: int = 0, *, max_steps: int = 10, share: float = 0.5) -> "AlfWorld":
        """Small generated games in the household with this number. `share` of all object classes occur in it: half of
        them, a dozen, can be learnt about in minutes."""
        notice = (f"ALFWorld: small GENERATED games in household {seed}, played on TextWorld's engine. "
                  "Their scores are not ALFWorld benchmark scores.")
        home = Household(seed, share=share)
        return cls(notice, {split: GeneratedTasks(split, 0, home) for split in SPLIT_COUNTS}, max_steps)

    def tasks(self, split: str) -> Sequence[Task]:
        return self.splits[split]

    def open(self, task: Task) -> AlfGame:
        """Raises ValueError naming the game if it is not a sound one."""
        try:
            data = pddl_game(task.data) if isinstance(task.data, Scene) else json.loads(task.data.read_text("utf-8"))
            return AlfGame(self, task, data)
        except Exception as error:                  # whatever is wrong with a file from elsewhere, say which file it is
            raise ValueError(f"{task.id} is not a sound ALFWorld game ({type(error).__name__}: {' '.join(str(error).split())}); "
                             "get it again with `alfworld-download`") from error


def _glance(path: Path) -> tuple[bool, str]:
    """Whether a game file is marked solvable, and its goal, without parsing 100 kB of JSON."""
    text = path.read_bytes()
    mark = re.search(rb'"solvable":\s*(true|false)', text)
    goal = re.search(rb'Your task is to: ([^"\\]*?)\.?\\"', text)
    if not mark or not goal:
        raise ValueError(f"{path} is not an ALFWorld game (no {'goal' if mark else 'mark `solvable`'}); "
                         "get it again with `alfworld-download`")
    return mark[1] == b"true", goal[1].decode()


def make(name: str, *, data: str = "", compact: bool = False, max_steps: int = 50, seed: int = 0) -> Environment:
    """The environment that a configuration asks for. Raises ValueError or ImportError with the mend."""
    if name != "alfworld":
        raise ValueError(f"environment {name!r} is unknown; there is: alfworld")
    _textworld()
    if compact:
        return AlfWorld.household(seed, max_steps=max_steps)
    # Importing alfworld sets $ALFWORLD_DATA to a cache folder, so the variable alone says nothing.
    found = data or os.environ.get("ALFWORLD_DATA", "")
    if data or (found and (Path(found) / "json_2.1.1" / "train").is_dir()):
        return AlfWorld.official(found, max_steps=max_steps)
    return AlfWorld.generated(seed, max_steps=max_steps)


# ---- 5. Generated games: what the wheel knows ---------------------------------------------------------------------------------

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


@lru_cache(maxsize=None)
def wheel() -> SimpleNamespace:
    """The tables of the wheel, read on first use. None of this needs AI2-THOR, torch or the data set."""
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
        return wheel().goals[self.kind]["templates"][self.template].format(
            obj=self.target.lower(), recep=self.destination.lower(), toggle=self.destination.lower())


def entity(cls: str, number: int) -> str:
    """The PDDL name of an instance; ALFWorld shows the part before `_bar_`, plus `basin` where the name has that."""
    return f"{cls[:-5]}_bar_{number}_bar_{cls}" if cls.endswith("Basin") else f"{cls}_bar_{number}"


# ---- 6. Games on official floor plans ------------------------------------------------------------------------

@lru_cache(maxsize=None)
def floor_plan(number: int) -> tuple[dict[str, list[str]], list[str], bool]:
    """One of the 120 rooms: its receptacles' ids by class, its movable object classes, whether it has a desk lamp."""
    present, listed = (json.loads((wheel().layouts / f"FloorPlan{number}-{what}.json").read_text())
                       for what in ("objects", "openable"))
    # `listed` names instances, "Sink|-01.90|+00.97|-01.50|SinkBasin", but leaves out fixtures such as stove burners.
    count = Counter(next(part for part in reversed(name.split("|")) if part.isalpha()) for name in listed)
    count.update({p: 4 if p == "StoveBurner" else 1 for p in wheel().holds if p in present and p not in count})
    ids = {p: [entity(p, i) for i in range(count[p])] for p in sorted(count)}
    objects = sorted(o for o in present if any(o in wheel().holds[p] for p in ids))
    return ids, objects, "DeskLamp" in present and any(p in ids for p in LAMP_STANDS)


@lru_cache(maxsize=None)
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


@lru_cache(maxsize=None)
def plans_for(kind: str, unseen: bool) -> list[int]:
    """The floor plans of a split in which a task type is possible."""
    rooms = [n for room in sorted(wheel().rooms[kind]) for n in wheel().plans[room]]
    return [n for n in rooms if (n in UNSEEN_PLANS) == unseen and possible_goals(kind, n)]


def floor_plan_scene(rng: random.Random, split: str) -> tuple[Scene, str]:
    """Draw a task and furnish the room: one to three of each object class, each somewhere plausible."""
    kind = rng.choices(list(KIND_COUNTS), KIND_COUNTS.values())[0]
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
    occur in no other split.
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
        return [p for p in ROOMS[room][0] if p not in wheel().openable and p != self.habit[target]]

    def scene(self, rng: random.Random, split: str) -> tuple[Scene, str]:
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


def generate_game(index: int, *, split: str, seed: int = 0, household: Household | None = None) -> Task:
    """The same task, its data written out as the dictionary that TextWorld's `PddlEnv.load` takes."""
    task = generate_task(index, split=split, seed=seed, household=household)
    return dataclasses.replace(task, data=pddl_game(task.data))


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


# ---- 9. The oracle -------------------------------------------------------------------------------------------

def display_names(ids: list[str]) -> dict[str, str]:
    """PDDL id -> its name in the text. ALFWorld numbers the sorted ids of a class from last to first."""
    cls = {i: i.lower().split("_bar_")[0] + ("basin" if "basin" in i.lower() else "") for i in ids}
    left, names = Counter(cls.values()), {}
    for i in sorted(ids, key=str.lower):
        names[i] = f"{cls[i]} {left[cls[i]]}"
        left[cls[i]] -= 1
    return names


def oracle_walkthrough(game: dict) -> list[str]:
    """Commands that win a game, generated or original, from its full symbolic state: fetch, process, deliver."""
    init, _, wish = game["pddl_problem"].partition("(:goal")
    place, class_of, kind_of, spot, start = (dict(re.findall(rf"\({fact} (\w+) (\w+)\)", init)) for fact in (
        "inReceptacle", "objectType", "receptacleType", "receptacleAtLocation", "atLocation"))
    names = display_names([*spot, *class_of])
    shut = set(re.findall(r"\(openable (\w+)\)", init)) - set(re.findall(r"\(opened (\w+)\)", init))
    here, commands = start["agent1"], []

    def named(table: dict[str, str], variable: str) -> list[str]:
        return sorted(i for i, cls in table.items() if f" {variable} {cls})" in wish and (i in place or i in spot))

    def visit(receptacle: str, reach_inside: bool = True) -> None:
        nonlocal here
        commands.extend([f"go to {names[receptacle]}"] if spot[receptacle] != here else [])
        here = spot[receptacle]
        if reach_inside and receptacle in shut:
            commands.append(f"open {names[receptacle]}")
            shut.remove(receptacle)

    two = "?o2" in wish
    targets, goals = named(class_of, r"?o1" if two else "?o"), named(kind_of, "?r")
    process = next(((machine, verb) for _, machine, fact, verb in PROCESSES.values() if fact in wish), None)
    goal = max(goals, key=lambda r: sum(place[o] == r for o in targets), default=None)    # where most already are
    fetch = [o for o in targets if process or place[o] != goal]
    for target in fetch[:1 + two - (len(targets) - len(fetch))]:
        visit(place[target])
        commands.append(f"take {names[target]} from {names[place[target]]}")
        if process:
            machine = next(r for r, cls in sorted(kind_of.items()) if cls == f"{process[0]}Type" and r in spot)
            visit(machine, reach_inside=False)
            commands.append(f"{process[1]} {names[target]} with {names[machine]}")
        if goal is None:
            lamp = named(class_of, "?ot")[0]
            visit(place[lamp], reach_inside=False)
            commands.append(f"use {names[lamp]}")
        else:
            visit(goal)
            commands.append(f"move {names[target]} to {names[goal]}")
    return commands


class GeneratedTasks(Sequence):
    """The tasks of a split, made when asked for."""

    def __init__(self, split: str, seed: int, household: Household | None = None):
        self.split, self.seed, self.household = split, seed, household

    def __len__(self) -> int:
        return SPLIT_COUNTS[self.split]

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return generate_task(index, split=self.split, seed=self.seed, household=self.household)
