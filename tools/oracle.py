"""A player that sees everything: commands that win any ALFWorld game, for tests, the benchmark and lessons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from envs import PROCESSES, State


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


def winning_actions(env: Any, task: Any) -> list[str]:
    """Actions that win a task of one of the two benchmarks (on WebShop: that buy its product); none for another environment."""
    if env.name == "alfworld":
        return oracle_walkthrough(env._data(task))
    if env.name != "webshop":
        return []
    product = task.data.product
    wanted = {str(option[1] if isinstance(option, tuple) else option).lower() for option in task.data.options}
    clicks = [f"click[{value}]" for values in product.options.values() for value in values if value.lower() in wanted]
    return [f"search[{product.name.lower()}]", f"click[{product.asin.lower()}]", *clicks, "click[buy now]"]


def walked(env: Any, task: Any) -> Iterator[tuple[State, str, State]]:
    """A winning way, played: the state before each action, the action, and the state that follows."""
    with env.open(task) as game:
        state = game.start
        for action in winning_actions(env, task):
            after = game.step(state, action)
            yield state, action, after
            if after.done:                          # won, or out of steps
                return
            state = after
