"""A world of one's own: six places, and things that are nearly always where they belong. `python siri.py --env room.py:Room`."""

import random

from envs import SUCCESS_REWARD, State, Task

PLACES = "bed desk drawer dresser safe shelf".split()
THINGS = "book cd pen".split()


class Search:
    def __init__(self, task):
        self.task = task
        self.start = self.state("you are in the middle of a room .")

    def state(self, text, **outcome):
        return State(text, tuple(f"go to {place} 1" for place in PLACES), anchor=text, **outcome)

    def step(self, state, action):
        found = action == f"go to {self.task.data} 1"
        return self.state(f"you see {self.task.kind if found else 'nothing'} .", success=found, reward=SUCCESS_REWARD * found,
                          valid=action in state.admissible)


class Room:
    max_steps = 2

    def __init__(self, seed):
        self.usual = dict(zip(THINGS, random.Random(seed).sample(PLACES, len(THINGS))))

    def tasks(self, split):
        rng, out = random.Random(split), []
        for i in range(300):
            thing = THINGS[i % len(THINGS)]
            place = self.usual[thing] if rng.random() < 0.9 else rng.choice(PLACES)
            out.append(Task(f"{split}/{i}", thing, f"find a {thing}", split, data=place))
        return out

    def open(self, task):
        return Search(task)
