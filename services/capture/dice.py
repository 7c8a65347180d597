"""Random numbers for the rendered scene: the standard library's and OpenCV's.

numpy.random would add 6 MB to a process whose memory counts.
"""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Dice:
    """A stream of random numbers that depends on the integers it is made from, and nothing else."""

    def __init__(self, *key: int) -> None:
        self._random = random.Random(":".join(map(str, key)))
        self.chance = self._random.random  # 0..1
        self.uniform = self._random.uniform
        self.below = self._random.randrange

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` of the options, none twice."""
        return self._random.sample(options, count)

    def poisson(self, mean: float) -> int:
        """Knuth's method: how many uniform numbers multiply to more than exp(-mean), less one."""
        count, product = 0, self.chance()
        while product > math.exp(-mean):
            count, product = count + 1, product * self.chance()
        return count

    def spread(self, low: float, high: float, *shape: int) -> NDArray[np.float32]:
        numbers = [self.uniform(low, high) for _ in range(math.prod(shape))]
        return np.array(numbers, np.float32).reshape(shape)

    def noise(self, *shape: int) -> NDArray[np.float32]:
        """Normally distributed numbers of unit deviation."""
        noise = np.empty(shape, np.float32)
        cv2.setRNGSeed(self._random.getrandbits(31))
        cv2.randn(noise, np.zeros(1), np.ones(1))
        return noise
