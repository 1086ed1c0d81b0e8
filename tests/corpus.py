"""A synthetic English that a small model learns in seconds and never perfectly: the text behind tests/models.py.

Short stories about people who hold jobs, live in places and own things. Which verbs, objects and adjectives go with
which noun is drawn once from a seeded table, so the model has to store associations in its weights: that is where
quantisation damage shows. Names, places and things recur within a story, so attention is of use too. Built from
`random.Random`, whose sequence is the same in every Python.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

__all__ = ["Corpus"]


def words(text: str) -> list[str]:
    return text.split()


NAMES = words(
    """Ada Bruno Clara David Elena Felix Greta Hugo Irene Jonas Katya Leon Marta Nils Olga Pavel Rosa Simon Tilda
    Viktor"""
)
JOBS = words(
    """baker sailor doctor farmer painter miller weaver teacher hunter smith singer judge potter clerk gardener
    tailor"""
)
PLACES = words(
    """harbour village valley castle market forest island tower garden bridge mountain chapel station library meadow
    cellar"""
)
THINGS = words(
    """lantern ladder basket letter kettle violin anchor candle barrel mirror saddle hammer blanket compass ribbon
    bucket teapot painting feather button pillow needle carpet pepper wagon cradle"""
)
ANIMALS = words("horse raven goose rabbit donkey badger falcon kitten spider turtle")
VERBS = words(
    """carried painted mended found hid sold bought lost washed polished lifted broke measured admired borrowed buried
    counted wrapped dropped traded"""
)
MOVES = words("walked wandered hurried sailed returned climbed rode travelled")
ADJECTIVES = words(
    """old red heavy golden broken quiet narrow silver wooden bright dusty gentle crooked hollow frozen purple tiny
    ancient polished rusty"""
)
FEELINGS = words("happy tired proud afraid curious lonely angry patient hopeful silent")
NUMBERS = words("two three four five six seven eight nine ten twelve")
TIMES = [
    "in the morning",
    "at noon",
    "after the storm",
    "before dawn",
    "in winter",
    "on market day",
    "late at night",
    "every summer",
]


class Table:
    """For every key a permutation of the words with weights that fall off quickly: a few likely ones, a long tail."""

    def __init__(self, rng: random.Random, keys: Sequence[str], words: Sequence[str], decay: float = 0.55) -> None:
        self.weights = list(accumulate(decay**i + 0.004 for i in range(len(words))))
        self.order = {key: rng.sample(words, len(words)) for key in keys}

    def draw(self, rng: random.Random, key: str) -> str:
        return rng.choices(self.order[key], cum_weights=self.weights)[0]


class Corpus:
    """One language, fixed by `seed`; `text(seed, characters)` speaks it."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = random.Random(seed)
        self.job = Table(rng, NAMES, JOBS, 0.3)
        self.home = Table(rng, NAMES, PLACES, 0.4)
        self.verb = Table(rng, JOBS, VERBS)
        self.thing = Table(rng, VERBS, THINGS)
        self.look = Table(rng, THINGS + ANIMALS + PLACES, ADJECTIVES)
        self.move = Table(rng, NAMES, MOVES)
        self.road = Table(rng, PLACES, PLACES)
        self.time = Table(rng, PLACES, TIMES)
        self.pet = Table(rng, PLACES, ANIMALS)
        self.mood = Table(rng, [f"{verb} {thing}" for verb in VERBS for thing in THINGS], FEELINGS, 0.3)
        self.count = Table(rng, THINGS, NUMBERS)

    def text(self, seed: int, characters: int) -> str:
        """At least `characters` characters of stories, one a line; the same for the same two seeds."""
        rng = random.Random(f"{self.seed}/{seed}")
        stories: list[str] = []
        size = 0
        while size < characters:
            stories.append(self.story(rng))
            size += len(stories[-1]) + 1
        return "\n".join(stories) + "\n"

    def story(self, rng: random.Random) -> str:
        hero, friend = rng.sample(NAMES, 2)
        job, place = self.job.draw(rng, hero), self.home.draw(rng, hero)
        sentences = [f"{hero} was a {job} who lived near the {self.look.draw(rng, place)} {place}."]
        for _ in range(rng.randint(3, 6)):
            verb = self.verb.draw(rng, job)
            thing = self.thing.draw(rng, verb)
            animal = self.pet.draw(rng, place)
            match rng.randrange(5):
                case 0:
                    time = self.time.draw(rng, place)
                    sentences.append(f"{time.capitalize()} the {job} {verb} the {self.look.draw(rng, thing)} {thing}.")
                case 1:
                    goal = self.road.draw(rng, place)
                    sentences.append(f"{hero} {self.move.draw(rng, hero)} from the {place} to the {goal}.")
                    place = goal
                case 2:
                    mood = self.mood.draw(rng, f"{verb} {thing}")
                    sentences.append(f"When {hero} {verb} a {thing}, {friend} was {mood}.")
                case 3:
                    look = self.look.draw(rng, animal)
                    sentences.append(f"There {friend} met a {look} {animal} and gave it to {hero}.")
                case _:
                    sentences.append(f"{friend} said: {hero} the {job} has {self.count.draw(rng, thing)} {thing}s.")
        return " ".join(sentences)

    @cached_property
    def sample(self) -> str:
        """A little of everything: what the tokenizer is trained on, and what a recipe's digest covers."""
        return self.text(seed=-1, characters=60_000)
