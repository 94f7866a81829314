"""Games that TextWorld's `tw-make` made, in a folder games/ beside this file: `python siri.py --env tw_game.py:TwGames`."""

from pathlib import Path

import textworld

from envs import Task
from tools.gym_text import GymWorld

WANTED = textworld.EnvInfos(admissible_commands=True, description=True, objective=True, won=True)


def words(text):
    """What a game says, without the input line and status bar below it, on one line."""
    return " ".join(text.partition("\n>")[0].split())


class Player:
    """A game with the two methods of a Gymnasium environment. TextWorld's games have no chance: a seed decides nothing."""

    def __init__(self, path):
        self.game = textworld.start(path, WANTED)

    def reset(self, *, seed=None):
        state = self.game.reset()
        return words(state.description), state

    def step(self, action):
        state, reward, done = self.game.step(action)
        return words(state.feedback), reward, done and state.won, done and not state.won, state

    def close(self):
        self.game.close()


class TwGames(GymWorld):
    max_steps = 20

    def tasks(self, split):
        paths = sorted(Path(__file__).with_name("games").glob(f"{split}-*.z8"))
        goals = [words(Player(str(path)).reset()[1].objective) for path in paths]
        return [Task(path.stem, "game", goal, split, str(path)) for path, goal in zip(paths, goals)]

    def make(self, task):
        return Player(task.data)
