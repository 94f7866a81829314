"""An environment of one's own: `--env my_room.py:Room`, or `--env package.module:Class`. docs/own-environment.md says what the
class must have.

The file is code of the user's and is executed, as `python my_room.py` would. What is wrong with it is found before any long work,
by playing two steps of the first game; what the class may leave out is filled in by `World`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import envs
from policy import HERE, UserError, load_tokenizer
from skills import FLAG, PHRASE, Form, count, number
from tools.terminal import say

GIVEN = ("seed", "max_steps")               # what a constructor gets, if it takes it
NEEDED = dict(tasks="tasks(split)", open="open(task)")
NAMES = Form(lambda x: isinstance(x, (tuple, list)) and "train" in x and all(map(PHRASE.holds, x)),
             "names of splits, 'train' among them")
LOOKED_AT = 100                             # tasks of a sequence that makes them when they are asked for; of a list: all
READ = 10                                   # first states of a split whose words a small policy must know


class WorldError(ValueError):
    """A class of the user's failed while it was played, or gave what can't be used; the message says where."""


def is_own(env: str) -> bool:
    """Whether `--env` names a class, and not a benchmark."""
    return ":" in env


def cause(error: BaseException, file: str) -> str:
    """What an exception says, and from which line of the user's file it comes."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f" (line {lines[-1]} of {Path(file).name})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{place}"


def near(name: str, there: Iterable[str]) -> str:
    """A question for what was probably meant; empty if nothing is like it."""
    found = difflib.get_close_matches(name, [*there], 1)
    return f"; did you mean {found[0]}?" if found else ""


def first(tasks: Sequence[envs.Task], n: int) -> list[envs.Task]:
    """The first n tasks, of a sequence that may know no slices."""
    return [tasks[i] for i in range(min(n, len(tasks)))]


@contextlib.contextmanager
def located(file: str) -> Iterator[None]:
    """WorldError, with the line in the user's file, for whatever is raised inside but MachineFault."""
    try:
        yield
    except envs.MachineFault:
        raise
    except (Exception, SystemExit) as e:                # a user's code may raise anything
        raise WorldError(cause(e, file)) from e


# ---- 1. Finding the class ---------------------------------------------------------------------------------------------

def file_of(where: str) -> Path:
    """The file that is named before the colon, seen from the working folder."""
    return Path(os.path.abspath(os.path.expanduser(where)))


def lies_in(env: str, folder: Path) -> bool:
    """Whether what `--env` names is in a folder: as a file, or as a module below the working folder."""
    where = env.rpartition(":")[0]
    return any(folder.resolve() in path.resolve().parents for path in (file_of(where), Path(where.replace(".", os.sep))))


def search(folder: Path) -> None:
    """Have Python look for modules in a folder, too, after all others."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@lru_cache(maxsize=4)
def executed(path: Path, code: bytes) -> ModuleType:
    """A file as a module; the same one for the same text. Its folder is searched for what it imports, after all others."""
    module = ModuleType(f"own_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module               # where dataclasses look for their module
    search(path.parent)
    exec(compile(code, str(path), "exec"), module.__dict__)
    return module


def module_of(env: str, where: str) -> ModuleType:
    """The file or module in which the class is. UserError if it isn't there or can't be executed."""
    is_file = where.endswith(".py") or os.sep in where
    path = file_of(where)
    if is_file and not path.is_file():
        raise UserError(f"--env {env}: there is no file {path}; a relative path is taken from the working folder: work where it "
                        "is, or give --env with its whole path")
    try:
        if is_file:
            return executed(path, path.read_bytes())
        search(Path.cwd())
        return importlib.import_module(where)
    except (Exception, SystemExit) as e:
        raise UserError(f"--env {env}: {where} cannot be imported: {cause(e, str(path))}") from e


@dataclass(frozen=True)
class Own:
    """A class of the user's, found and looked at."""
    env: str                            # as `--env` names it
    cls: Any
    file: str                           # where it is written, which may be a module that the named one imports

    @property
    def digest(self) -> str:
        """Fingerprint of its file: 16 hex digits of SHA-256."""
        return hashlib.sha256(Path(self.file).read_bytes()).hexdigest()[:16]

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """What the constructor takes."""
        return {} if self.cls.__init__ is object.__init__ else dict(inspect.signature(self.cls).parameters)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits. The policy is trained on "train"; the last one is the panel's, unless `--split` is given."""
        return tuple(self.value(self.cls, "splits", ("train", "test"), NAMES))

    @property
    def max_steps(self) -> int:
        """The default of `--max-steps`: of the class, or of its constructor."""
        of_constructor = self.parameters.get("max_steps")
        return self.value(self.cls, "max_steps", of_constructor.default if of_constructor else None, count(1))

    def value(self, owner: Any, name: str, default: Any, form: Form) -> Any:
        """An attribute of the class or of what it makes. UserError if it isn't of this form."""
        value = getattr(owner, name, default)
        if value is None or value is inspect.Parameter.empty:
            raise self.wrong(f"has no {name}; add it: {name} = ...", name)
        if problem := form.problem(value):
            raise self.wrong(f"{name} is {str(value)[:40]!r}, expected {problem}")
        return value

    def wrong(self, problem: str, missing: str = "") -> UserError:
        """What is wrong with the class, and what may be meant by it."""
        return UserError(f"--env {self.env}: {self.cls.__name__} {problem}{near(missing, dir(self.cls)) if missing else ''}")


def find(env: str) -> Own:
    """The class that `--env` names, with all that can be seen without making one. UserError naming what is missing or wrong."""
    where, _, name = env.rpartition(":")
    module = module_of(env, where)
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        there = [n for n, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__]
        raise UserError(f"--env {env}: {where} has no class {name or 'without a name'}"
                        + (near(name, there) or f"; its classes: {', '.join(there) or 'none'}"))
    own = Own(env, cls, getattr(sys.modules.get(cls.__module__), "__file__", None) or module.__file__ or "")
    for method, form in NEEDED.items():
        if not callable(getattr(cls, method, None)):
            raise own.wrong(f"has no method {form}", method)
    if strange := [p.name for p in own.parameters.values() if p.name not in GIVEN and p.default is p.empty
                   and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
        raise own.wrong(f"needs {strange[0]} to be made; give it a default (known are {', '.join(GIVEN)})")
    assert own.splits and own.max_steps                 # they are there, or say what is wrong
    return own


# ---- 2. The class as an environment -----------------------------------------------------------------------------------

class World:
    """An environment of one's own, as the program uses it: what it leaves out is filled in, what it gives is checked."""

    def __init__(self, own: Own, seed: int, max_steps: int) -> None:
        given = dict(seed=seed, max_steps=max_steps)
        try:
            self.made = own.cls(**{name: value for name, value in given.items() if name in own.parameters})
        except Exception as e:
            raise own.wrong(f"cannot be made: {cause(e, own.file)}") from e
        self.own, self.max_steps, self.known = own, max_steps, dict[str, Sequence[envs.Task]]()
        self.name: str = own.value(self.made, "name", own.cls.__name__.lower(), PHRASE)
        self.scored: bool = own.value(self.made, "scored", False, FLAG)
        self.success_reward: float = own.value(self.made, "success_reward", envs.SUCCESS_REWARD, number(above=0))
        self.notice: str = own.value(self.made, "notice", f"an environment of your own: {own.env}", PHRASE)
        self.verbatim: bool = own.value(self.made, "verbatim", False, FLAG)
        if self.name in ("alfworld", "webshop"):
            raise own.wrong(f"has the name of a benchmark, {self.name}; give it another")

    def tasks(self, split: str) -> Sequence[envs.Task]:
        """The tasks of a split. UserError if they can't be had or are malformed."""
        if split not in self.known:
            try:
                given = self.made.tasks(split)
                self.known[split] = given if isinstance(given, Sequence) else [*given]
            except Exception as e:
                raise self.own.wrong(f"tasks({split!r}) fails: {cause(e, self.own.file)}; are its splits {self.own.splits}?") from e
            self.check_tasks(split, self.known[split])
        return self.known[split]

    def check_tasks(self, split: str, tasks: Sequence[envs.Task]) -> None:
        """UserError for tasks that can't be played, or told from each other."""
        some, ids = tasks if isinstance(tasks, (list, tuple)) else first(tasks, LOOKED_AT), set[str]()
        if not some:
            raise self.own.wrong(f"tasks({split!r}) is empty")
        for k, task in enumerate(some):
            fault = (f"a {type(task).__name__}, not an envs.Task" if not isinstance(task, envs.Task) else
                     f"of split {task.split!r}" if task.split != split else
                     "without id, kind and goal as texts" if not all(map(PHRASE.holds, (task.id, task.kind, task.goal))) else
                     f"another one of id {task.id!r}" if task.id in ids else "")
            if fault:
                raise self.own.wrong(f"tasks({split!r})[{k}] is {fault}")
            ids.add(task.id)

    def open(self, task: envs.Task) -> OwnGame:
        """A game. WorldError if the class fails, or its game has not what it needs; MachineFault as it comes."""
        return OwnGame(self, task)


class OwnGame(contextlib.AbstractContextManager):
    """A game of a World: steps are counted, and an episode ends when it is won or at `max_steps`, whatever the class says."""

    def __init__(self, world: World, task: envs.Task) -> None:
        self.world, self.task = world, task
        with located(world.own.file):
            self.game = world.made.open(task)
        for name, form in dict(start="start", step="step(state, action)").items():
            if not hasattr(self.game, name):
                raise WorldError(f"what open(task) gives, a {type(self.game).__name__}, has no {form}{near(name, dir(self.game))}")
        self.start = replace(self.checked(self.game.start, "start"), steps=0)

    def step(self, state: envs.State, action: str) -> envs.State:
        """The state after an action. Raises as `World.open`."""
        with located(self.world.own.file):
            after = self.game.step(state, action)
        after, steps = self.checked(after, "step(state, action)"), state.steps + 1
        return replace(after, steps=steps, done=after.done or after.success or steps >= self.world.max_steps)

    def checked(self, state: Any, name: str) -> envs.State:
        """The state with plain Python's numbers. WorldError if it isn't one."""
        if not isinstance(state, envs.State):
            raise WorldError(f"{name} is a {type(state).__name__}, not an envs.State")
        for field in ("observation", "anchor"):
            if not isinstance(value := getattr(state, field), str):
                raise WorldError(f"{name}: {field} is a {type(value).__name__}, not a text")
        if not isinstance(state.admissible, (tuple, list)) or not all(isinstance(a, str) for a in state.admissible):
            raise WorldError(f"{name}: admissible is not a tuple of texts: {str(state.admissible)[:40]}")
        with located(""):                               # numbers of numpy are fine
            state = replace(state, admissible=tuple(state.admissible), reward=float(state.reward), done=bool(state.done),
                            success=bool(state.success), valid=bool(state.valid), score=float(state.score))
        if self.world.scored and not 0 <= state.score <= 1:
            raise WorldError(f"{name}: score is {state.score}, expected 0 to 1")
        return state

    def close(self) -> None:
        """The game is over; the class need not know."""
        getattr(self.game, "close", lambda: None)()

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- 3. A first look at it --------------------------------------------------------------------------------------------

def make(cfg: Any) -> World:
    """The environment of these settings (`siri.Config`), looked at in a first game. UserError naming what is wrong."""
    own = find(cfg.env)
    world = World(own, cfg.seed, cfg.max_steps)
    enter_prompts(world)
    train, panel = ({task.id for task in first(world.tasks(split), LOOKED_AT)} for split in ("train", cfg.split))
    if cfg.split != "train" and (both := train & panel):
        raise own.wrong(f"has task {min(both)!r} in train and in {cfg.split}; ids are unique over all splits")
    rehearse(world)
    if cfg.compact:
        refuse_unknown_words(world, cfg.split, cfg.model)
    return world


def enter_prompts(world: World) -> None:
    """Put the class's own prompts, if it has any, into `envs.PROMPTS`. UserError for one that can't be filled in."""
    own, prompts = world.own, getattr(world.made, "prompts", {})
    for style in ("full", "compact"):
        envs.PROMPTS.pop((own.env, style), None)
    for style, text in prompts.items() if isinstance(prompts, dict) else [("prompts", prompts)]:
        if style not in ("full", "compact") or not isinstance(text, str):
            raise own.wrong("prompts is not a dictionary with a text for 'full', for 'compact', or both")
        fields = dict(goal="-goal-", skill="-skill-", observation="-seen-")
        try:
            filled = text.format(**fields, history="", step=1, actions="")
        except (KeyError, ValueError, IndexError, AttributeError) as e:
            raise own.wrong(f"prompts[{style!r}] cannot be filled in ({cause(e, own.file)}); double braces that are text") from e
        if lacks := [field for field, mark in fields.items() if mark not in filled]:
            raise own.wrong(f"prompts[{style!r}] has no {{{lacks[0]}}}")
        envs.PROMPTS[own.env, style] = text


def rehearse(world: World) -> None:
    """Play two steps of the first training task. UserError for what fails, and for a game that isn't a function of its state: the
    rollouts of a group share it."""
    own, task = world.own, world.tasks("train")[0]
    try:
        with world.open(task) as game:
            if not game.start.admissible:
                raise WorldError("start: admissible is empty; list the actions")
            unsayable = [a for a in game.start.admissible if envs.parse_action(
                f"<think></think><action>{a}</action>", world.verbatim) != a]
            action = game.start.admissible[0]
            once = game.step(game.start, action)
            if not once.done:
                game.step(once, action)
            again = game.step(game.start, action)
    except envs.MachineFault as e:
        raise UserError(str(e)) from e
    except WorldError as e:
        raise own.wrong(f"fails in a first game ({task.id}): {e}") from e
    if unsayable:
        raise own.wrong(f"has the action {unsayable[0]!r}, and answers lose capitals, tags and blanks that are not single: "
                        "write it otherwise, or keep capitals and blanks by verbatim = True")
    if once != again:
        raise own.wrong(f"step is not a function of its state: {action!r} from the start gave another state once others had been "
                        "played; return new states and change nothing (for a world with a memory: tools/gym_text.py)")


def refuse_unknown_words(world: World, split: str, model: str) -> None:
    """UserError if the small policy, whose vocabulary is closed and in small letters, can't read goals and first observations, or
    can't say an action."""
    folder = next((path for path in (HERE / model, Path(model)) if (path / "tokenizer.json").exists()), None)
    if folder is None:
        return                              # the policy itself will say so
    tokenizer, texts, actions = load_tokenizer(str(folder), {}), set[str](), set[str]()
    for task in (*first(world.tasks("train"), READ), *first(world.tasks(split), READ)):
        with world.open(task) as game:
            texts |= {task.goal, game.start.observation}
            actions |= {*game.start.admissible}
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)
    unknown = sorted({word for text in texts | actions for word in text.split() if tokenizer.unk_token_id in ids(word)})
    unsaid = sorted(action for action in actions if tokenizer.decode(ids(action)) != action)
    if unknown or unsaid:
        lacks, words = "read these words" if unknown else "write these actions", unknown or unsaid
        raise UserError(f"--model {model}: the small policy cannot {lacks} of {world.own.env}: {', '.join(map(repr, words[:12]))}"
                        f"{', ...' * (len(words) > 12)}; give a chat model: --preset paper --no-4bit --model FOLDER")


def same_file(env: str, before: str) -> str:
    """The fingerprint of the class's file now; says so if it was another one when the run began."""
    digest = find(env).digest
    if before not in ("", digest):
        say(f"     warning: the file of {env} has changed since this run began; results before and after are of two worlds")
    return digest
