"""A Gymnasium-style environment as a world: `python siri.py --env gym_room.py:GymRoom`."""

import random

from tools.gym_text import GymWorld

PLACES = "bed desk drawer dresser safe shelf".split()


class BookEnv:
    """As others write them: with a memory, a seed, and the five values of `step`."""

    def reset(self, *, seed=None, options=None):
        rng = random.Random(seed)
        self.place, self.looks = "shelf" if rng.random() < 0.8 else rng.choice(PLACES), 0
        return "you are in the middle of a room .", {}

    def step(self, action):
        self.looks += 1
        found = action == f"go to {self.place} 1"
        return f"you see {'book' if found else 'nothing'} .", float(found), found, self.looks == 2, {}


class GymRoom(GymWorld):
    max_steps, goal = 2, "find a book"
    commands = [f"go to {place} 1" for place in PLACES]

    def make(self, task):
        return BookEnv()
