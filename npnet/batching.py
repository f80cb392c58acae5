"""The samples of a data set in batches, shuffled or in order."""

from collections.abc import Iterator

from npnet.backend import Array, backend_of, to_backend
from npnet.checks import check_flag, check_pairs, check_whole, shown
from npnet.layer import Pair
from npnet.random import RNG, as_generator
from npnet.ranks import share_of


def batches(
    x: Array,
    y: Array,
    batch_size: int,
    rng: RNG = None,
    shuffle: bool = True,
    drop_last: bool = False,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Pair]:
    """The samples in batches of ``batch_size`` rows; if they do not divide evenly, the last one is shorter, or dropped.

    ``start`` leaves out so many samples, of those that would come first; ``part`` (rank, size) gives of each batch the
    rows that fall to one of several processes (see `npnet.ranks.share_of`).

    >>> import numpy as np
    >>> [len(x) for x, y in batches(np.zeros((5, 3)), np.zeros((5, 1)), 2)]
    [2, 2, 1]
    """
    backend_of(x), backend_of(y)  # refuse what is no array
    check_pairs(x, y)
    shuffle, drop_last = check_flag(shuffle, "shuffle"), check_flag(drop_last, "drop_last")
    batch_size = check_whole(batch_size, "batch_size", least=1)
    if not isinstance(part, (tuple, list)) or len(part) != 2:
        raise TypeError(f"part: expected (rank, size), got {shown(part)}")
    size = check_whole(part[1], "part: size", least=1)
    rank = check_whole(part[0], "part: rank", most=size - 1)
    order = as_generator(rng).permutation(len(x)) if shuffle else None  # drawn now, whoever takes how many
    firsts = range(check_whole(start, "start"), len(x) - (batch_size - 1 if drop_last else 0), batch_size)

    def parts(array: Array) -> Iterator[Array]:
        own = None if order is None else to_backend(order, backend_of(array).name)  # moved once, not batch by batch
        for first in firsts:
            share = share_of(rank, size, min(batch_size, len(x) - first))
            span = slice(first + share.start, first + share.stop)
            yield array[span if own is None else own[span]]

    return zip(parts(x), parts(y), strict=True)
