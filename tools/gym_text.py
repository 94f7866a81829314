"""An environment of one's own out of a Gymnasium-style text environment: `reset(seed=...)` and `step(action)`. Nothing of
Gymnasium is imported: whatever has the two methods will do.

Such an environment has a memory, and the rollouts of a group branch from one start. So a state here is *the actions that led to
it*: to go on from a state, the environment is reset with the task's seed and those actions are played again, or, with
`copies = True`, a deep copy that was kept at that state is taken. A replay asks of the environment that its seed decides
everything, and takes time with the square of an episode's length; copies ask that it can be deep-copied, and take memory for each
state. A state that any rollout of the group has been in before is looked up. A replay that ends in another text raises.

`terminated` and `truncated` are kept apart: both end the episode, only a terminated one can be a success (`GymWorld.succeeded`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from envs import State, Task


class GymWorld:
    """Inherit from it, say how an environment is made, and name the class: `--env my_gym.py:MyWorld`. docs/own-environment.md."""
    splits: tuple[str, ...] = ("train", "test")
    max_steps: int                              # actions per episode; where the environment truncates earlier, it does
    success_reward = 1.0                        # the reward of the action that succeeds; rewards are taken as they come
    verbatim = True                             # actions are sent with the capitals and blanks that they have
    copies = False                              # reach a state by a deep copy instead of a replay
    episodes = 200                              # seeds per split, which are its tasks
    goal = ""                                   # the sentence that the policy is given
    commands: Sequence[str] = ()                # the actions, where `info` doesn't list them

    def make(self, task: Task) -> Any:
        """A new environment for the task."""
        raise NotImplementedError("write make(self, task), which gives a new environment")

    def tasks(self, split: str) -> Sequence[Task]:
        """By default one for each seed; no seed is in two splits. `task.data` is the seed that `reset` gets."""
        first = self.splits.index(split) * self.episodes
        return [Task(f"{split}/{seed}", type(self).__name__.lower(), self.goal, split, seed)
                for seed in range(first, first + self.episodes)]

    def admissible(self, info: Mapping[str, Any]) -> Sequence[str]:
        """The actions of a state: what `info` lists as `admissible_commands`, else `commands`."""
        return info.get("admissible_commands") or self.commands

    def succeeded(self, reward: float, info: Mapping[str, Any]) -> bool:
        """Whether a terminated episode was a success: what `info["success"]` says, else whether its last reward reaches
        `success_reward`. Not asked of a truncated one."""
        return bool(info["success"]) if "success" in info else reward >= self.success_reward

    def open(self, task: Task) -> GymGame:
        """A game of the task."""
        return GymGame(self, task)


class GymGame:
    """One task. A state's `engine` is the tuple of actions that led to it."""

    def __init__(self, world: GymWorld, task: Task) -> None:
        self.world, self.task, self.env = world, task, world.make(task)
        self.at: tuple[str, ...] | None = None                      # the actions since `env` was reset; None: it is not in use
        self.kept = dict[tuple[str, ...], Any]()                    # copies of `env`, as it was after so many actions
        text, info = self.env.reset(seed=task.data)
        self.start = self.state((), text, info)
        self.known = {(): self.start}

    def state(self, actions: tuple[str, ...], text: str, info: Mapping[str, Any], **outcome: Any) -> State:
        """What the environment shows after these actions, at which it is now."""
        self.at = actions
        if self.world.copies and not outcome.get("done"):
            self.kept[actions] = copy.deepcopy(self.env)
        return State(text, tuple(self.world.admissible(info)), anchor=text, engine=actions, **outcome)

    def step(self, state: State, action: str) -> State:
        """The state after an action. ValueError if a replay did not lead to the state."""
        actions = (*state.engine, action)
        if actions not in self.known:
            self.go_to(state)
            self.at = None                                          # should the environment raise
            text, reward, terminated, truncated, info = self.env.step(action)
            success = bool(terminated and self.world.succeeded(float(reward), info))
            self.known[actions] = self.state(
                actions, text, info, reward=float(reward), done=bool(terminated or truncated), success=success,
                score=float(success), valid=action in state.admissible or not state.admissible)
        return self.known[actions]

    def go_to(self, state: State) -> None:
        """Bring the environment to a state: it may be there, else by a copy, else by a replay."""
        if self.at == state.engine:
            return
        if self.world.copies:
            self.env = copy.deepcopy(self.kept[state.engine])
            return
        text, _ = self.env.reset(seed=self.task.data)
        for action in state.engine:
            text = self.env.step(action)[0]
        if text != state.observation:
            raise ValueError("the same seed and actions led to another text: the seed doesn't decide everything; try copies = True")

    def close(self) -> None:
        """Close the environment, if it can be closed."""
        getattr(self.env, "close", lambda: None)()
