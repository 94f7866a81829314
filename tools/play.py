"""Play a benchmark yourself: `python siri.py --play`; or `--play runs/NAME` to watch that run's policy play.

You see what the policy sees: the task, the page, the commands. A page of WebShop is laid out, with its buttons where they
belong. The policy is loaded when it is first asked, so that a game starts at once. Text of environments and policies is printed
without its control characters, so that it can't drive the terminal. The games are those of the evaluation panel (`--split`,
`--panel`), in an order that `--seed` draws.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
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

HELP = """Type a command or its number; to search in the shop: search red shoes. Besides:
  ?  this help                                              n  a new game
  h  what the policy would do now: its thought and action   q  quit
  w  watch: the policy plays on to the end                  p  the exact prompt that the policy would see now"""
AFTER = "w or Enter: watch another game   n: play one yourself   q: quit"
SEARCH = "search[<your query>]"
BAR = ("search", "back to search", "< prev", "next >", "description", "features", "reviews", "buy now")    # below a page's text


def ask() -> str:
    """The next line from the person; q where the input ends."""
    try:
        line = input("> ").strip()
    except EOFError:
        line = "q"
    if not sys.stdin.isatty():
        say(line)                                  # a transcript of piped commands has both sides
    return line


def room(state: envs.State) -> tuple[str, list[str]]:
    """What is observed, and a numbered list of the commands; and the commands in the order of their numbers."""
    actions = [] if state.done else list(state.admissible)
    return "\n".join([state.observation, *(f"{k:3d} {action}" for k, action in enumerate(actions, 1))]), actions


def page(state: envs.State, goal: str) -> tuple[str, list[str]]:
    """A page of WebShop in either form of observation: its title, its text with numbered buttons in their places, a bar of the
    buttons that lead elsewhere; and what the buttons do, in the order of their numbers."""
    parts = [re.sub(r"\[(clicked )?button_?\]", "", part).strip() for part in re.split(r" \[SEP\] |\n", state.observation)]
    parts = [part for part in parts if part not in ("", "Instruction:", goal.strip())]
    clicks = {action[len("click["):-1].strip(): action for action in state.admissible if action != SEARCH}
    results = next((part for part in parts if part.startswith("Page ")), "")
    product = next((part for part, following in zip(parts, parts[1:]) if following.startswith("Price: ")), "")
    title = results or product or ("About the product" if "< prev" in clicks else parts[0])
    actions, lines = list[str](), [f"--- {title} ---"]
    if state.done:
        return lines[0], actions

    def button(label: str) -> str:
        actions.append(clicks.pop(label.lower()))
        return f"[{len(actions)}] {label}"

    for part in parts:
        is_button = part.lower() in clicks
        if part == title or is_button and part.lower() in BAR:
            continue
        # In the results a product's button heads its line; elsewhere a text does, such as an option's name.
        if is_button != bool(results):
            lines[-1:] = [f"{lines[-1]}  {button(part) if is_button else part}"]
        else:
            lines.append(f"  {button(part) if is_button else part}")
    lines.append("  ".join([button(part) for part in parts if part.lower() in clicks] + [button(label) for label in [*clicks]]))
    return "\n".join(lines).rstrip(), actions


def meaning(line: str, actions: list[str], verbatim: bool = False) -> str:
    """The action that a line means, `verbatim` or as `envs.parse_action` takes the policy's; "" with a remark if it means none."""
    numbered = {str(k): action for k, action in enumerate(actions, 1)}
    words = line if verbatim else " ".join(line.lower().split())
    action = numbered.get(line) or re.sub(r"^search ([^\[].*)$", r"search[\1]", words)
    if line.isdecimal() and line not in numbered:
        say(f"there is no command {line[:20]}: 1 to {len(numbered)}")
        return ""
    if action in (SEARCH, "click[search]", "search"):
        say("write it out, with words of your own: search red shoes")
        return ""
    return action


def play(env: envs.Environment, task: envs.Task, cfg: siri.Config, policy: Callable[[], Policy], watching: bool) -> str:
    """One game. Returns what is wanted next: n, a game to play; w, one to watch; q, nothing. UserError if it can't be opened."""
    try:
        game = env.open(task)
    except envs.MachineFault as e:
        raise UserError(str(e)) from e
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{task.id}: cannot be opened ({e}); mend or remove it") from e
    dice = itertools.count()                    # asked again, the policy may say something else
    episode, wanted = siri.Episode(task, None, state=game.start), "w" if watching else "n"
    show = room if cfg.env != "webshop" else lambda state: page(state, task.goal)
    verbatim = getattr(env, "verbatim", False)

    def prompt() -> list[int]:
        return siri.fit_prompt(policy(), episode, None)

    def response() -> str:
        return policy().answer(policy().generate([prompt()], cfg.eval_temperature, cfg.max_response, [next(dice)])[0])

    try:
        say(f"\n=== {task.id}\n=== {task.goal}")
        while not (state := episode.state).done:
            shown, actions = show(state)
            say(f"\n[{state.steps} of {env.max_steps}] {shown}")
            if not state.valid:
                say("(that was not a command that can be done here)")
            elif episode.steps and state.observation == episode.steps[-1].observation:
                say("(done; the page looks as before)")
            action = ""
            while not action and wanted != "w":
                line = ask()
                if line in ("n", "q"):
                    return line
                elif line == "?":
                    say(HELP)
                elif line == "p":
                    say(policy().tokenizer.decode(prompt()))
                elif line == "h":
                    say(f"the policy: {response()}")
                elif line == "w":
                    wanted = line
                elif line:
                    action = meaning(line, actions, verbatim)
            if wanted == "w":
                text = response()
                action = envs.parse_action(text, verbatim) or ""
                say(f"the policy: {text}\n> {actions.index(action) + 1 if action in actions else action}")
            episode.steps.append(siri.Step([], [], "", action, state.observation, state.anchor, None))
            episode.state = game.step(state, action)
        score = f", score {state.score:.2f}" if env.scored else ""
        say(f"\n{show(state)[0]}\n=== {'success' if state.success else 'not solved'}{score}, {state.steps} steps")
    except worlds.WorldError as e:
        raise UserError(f"{task.id}: {e}") from e
    finally:
        game.close()
    while wanted == "w":
        say(AFTER)
        if (line := ask()) in ("", "w", "n", "q"):
            return line or "w"
    return wanted


def command(run: str, given: dict[str, Any]) -> None:
    """`--play`: games until the person quits. The policy is the latest checkpoint of `run`, and is watched; with "" it is the
    preset's base policy, and the person plays. UserError for a run without a sound checkpoint."""
    checkpoint = latest_checkpoint(Path(run)) if run else None
    cfg = load_config(Path(run), given) if run else resolve(given)[0]
    env = make_environment(cfg)
    policy = cache(lambda: Policy(dataclasses.replace(cfg, update_tokens=1), checkpoint))      # no probe of training
    tasks = siri.panel_tasks(cfg, env)
    say(f"{env.notice}\npolicy: {checkpoint or cfg.model}\n{HELP}")
    order, wanted = np.random.default_rng(cfg.seed).permutation(len(tasks)), "w" if run else "n"
    for k in itertools.cycle(order):
        if (wanted := play(env, tasks[int(k)], cfg, policy, wanted == "w")) == "q":
            return
        say("")
