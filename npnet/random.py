"""Where random numbers come from.

Everything random takes ``rng=``: None, a seed, or a ``numpy.random.Generator``. Numbers are drawn on the
host with NumPy and then moved, so that a seed means the same numbers on every backend.
"""

from typing import TypeAlias

import numpy as np

from npnet.checks import check_whole

RNG: TypeAlias = int | np.random.Generator | None
"""What ``rng=`` takes: a seed, a generator, or None for fresh entropy."""


def as_generator(rng: RNG = None) -> np.random.Generator:
    """The generator that ``rng`` stands for.

    Raises:
        TypeError, ValueError: ``rng`` is not None, a generator or a whole number >= 0.

    >>> int(as_generator(3).integers(100)) == int(as_generator(3).integers(100))
    True
    """
    if rng is None or isinstance(rng, np.random.Generator):
        return np.random.default_rng(rng)
    return np.random.default_rng(check_whole(rng, "rng (a seed or a numpy.random.Generator)"))
