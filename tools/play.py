"""Play a benchmark yourself: `python siri.py --play`, or `--play runs/NAME` to have that run's policy at your side.

You see what the policy sees: the task, the page, the commands. The policy is loaded when it is first asked, so that a game
starts at once. Text of environments and policies is printed without its control characters, so that it can't drive the
terminal. The games are those of the evaluation panel (`--split`, `--panel`), in an order that `--seed` draws.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import envs
import siri
from policy import Policy, UserError
from tools import worlds
from tools.files import latest_checkpoint
from tools.settings import load_config, make_environment, resolve
from tools.terminal import say

HELP = """Type a command, or its number. Besides:
  ?  the exact prompt that the policy would see now        n  a new game
  h  what the policy would do now: its thought and action   q  quit
  w  watch: the policy plays on to the end"""


def ask() -> str:
    """The next line from the person; q where the input ends."""
    try:
        line = input("> ").strip()
    except EOFError:
        line = "q"
    if not sys.stdin.isatty():
        say(line)                                  # a transcript of piped commands has both sides
    return line


def meaning(line: str, state: envs.State, verbatim: bool = False) -> str:
    """The action that a line means, `verbatim` or as `envs.parse_action` takes the policy's; "" with a remark if it means none."""
    numbered = {str(k): action for k, action in enumerate(state.admissible, 1)}
    action = numbered.get(line, line if verbatim else " ".join(line.lower().split()))
    if line.isdecimal() and line not in numbered:
        say(f"there is no command {line[:20]}: 1 to {len(numbered)}")
        return ""
    if "<your query>" in action:
        say("write it out, with words of your own: search[red shoes]")
        return ""
    return action


def play(env: envs.Environment, task: envs.Task, cfg: siri.Config, policy: Callable[[], Policy]) -> bool:
    """One game. Returns whether another one is wanted. UserError if the game can't be opened."""
    try:
        game = env.open(task)
    except envs.MachineFault as e:
        raise UserError(str(e)) from e
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{task.id}: cannot be opened ({e}); mend or remove it") from e
    dice = itertools.count()                    # asked again, the policy may say something else
    episode, watching, verbatim = siri.Episode(task, None, state=game.start), False, getattr(env, "verbatim", False)

    def prompt() -> list[int]:
        return siri.fit_prompt(policy(), episode, None)

    def response() -> str:
        return policy().answer(policy().generate([prompt()], cfg.eval_temperature, cfg.max_response, [next(dice)])[0])

    try:
        say(f"\n=== {task.id}\n=== {task.goal}")
        while not (state := episode.state).done:
            say(f"\n[{state.steps} of {env.max_steps}] {state.observation}")
            if not state.valid:
                say("(that was not a command that can be done here)")
            action = ""
            if not watching:
                say("\n".join(f"{k:3d} {a}" for k, a in enumerate(state.admissible, 1)))
            while not action and not watching:
                line = ask()
                if line in ("n", "q"):
                    return line == "n"
                elif line == "?":
                    say(policy().tokenizer.decode(prompt()))
                elif line == "h":
                    say(f"the policy: {response()}")
                elif line == "w":
                    watching = True
                elif line:
                    action = meaning(line, state, verbatim)
            if watching:
                text = response()
                say(f"the policy: {text}")
                action = envs.parse_action(text, verbatim) or ""
            episode.steps.append(siri.Step([], [], "", action, state.observation, state.anchor, None))
            episode.state = game.step(state, action)
        score = f", score {state.score:.2f}" if env.scored else ""
        say(f"\n{state.observation}\n=== {'success' if state.success else 'not solved'}{score}, {state.steps} steps")
    except worlds.WorldError as e:
        raise UserError(f"{task.id}: {e}") from e
    finally:
        game.close()
    return True


def command(run: str, given: dict[str, Any]) -> None:
    """`--play`: games until the person quits. The policy is the latest checkpoint of `run`, or with "" the preset's base
    policy. UserError for a run without a sound checkpoint."""
    checkpoint = latest_checkpoint(Path(run)) if run else None
    cfg = load_config(Path(run), given) if run else resolve(given)[0]
    env = make_environment(cfg)
    policy = cache(lambda: Policy(dataclasses.replace(cfg, update_tokens=1), checkpoint))      # no probe of training
    tasks = siri.panel_tasks(cfg, env)
    say(f"{env.notice}\npolicy: {checkpoint or cfg.model}\n{HELP}")
    order = np.random.default_rng(cfg.seed).permutation(len(tasks))
    for k in itertools.cycle(order):
        if not play(env, tasks[int(k)], cfg, policy):
            return
        say("")
