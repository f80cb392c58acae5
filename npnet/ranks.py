"""The processes of a data-parallel training ("ranks"): a thin face over an mpi4py communicator.

``mpiexec -n 4 python train.py`` starts the same program four times. Each rank has the whole model and takes its share
of every batch; the gradients are summed (`npnet.gradient_sums`), and all ranks make the same update. What is here is
all that they have to say to each other besides: what they begin from, whether anything went wrong, and when to stop.

Whatever goes wrong on one rank must end them all, or the others wait for it forever. Where all ranks take part in what
fails, each raises (`Ranks.together`, `Ranks.agree`); where they do not, the one that fails says so and ends all
(`Ranks.guard`).

The words are those of the standard: MPI Forum, "MPI: A Message-Passing Interface Standard", version 4.1, 2023.
"""

import math
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from npnet.backend import Array, BackendUnavailable, array_module
from npnet.checks import shown
from npnet.launch import launched
from npnet.losses import TrainingDiverged, check_finite
from npnet.savable import difference

PATIENCE = 10.0
"""Seconds after which a rank says that it waits for others."""

INSTALL = "it needs the package mpi4py: pip install 'npnet[mpi]'"


class RankFailed(RuntimeError):
    """Another rank failed; the message names it and says what it said."""


class RankDiverged(TrainingDiverged):
    """What a rank computes on its share is not finite; the message names the rank, and the layer where that begins."""


def world() -> Any:
    """The communicator of all processes that ``mpiexec`` has started, or None without it.

    Raises:
        ImportError: there are several processes, and no mpi4py; or it does not see the others, since it uses another
            MPI than ``mpiexec``.
    """
    launch = launched()
    if launch is None:
        return None
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(f"npnet was started in {launch.size} processes: {INSTALL} ({error})") from error
    if MPI.COMM_WORLD.Get_size() != launch.size:
        raise ImportError(
            f"mpiexec started {launch.size} processes, but mpi4py sees {MPI.COMM_WORLD.Get_size()}: the two are of "
            f"different MPIs. mpi4py uses {MPI.Get_library_version().strip().splitlines()[0]}; take its mpiexec"
        )
    return MPI.COMM_WORLD


_keys: list[int] = []  # one, once it is made: the key under which a communicator keeps npnet's own (MPI: attribute)


def share_of(rank: int, size: int, rows: int) -> slice:
    """The rows of a batch that fall to one of ``size`` ranks: consecutive, and as many as the others' but for one.

    >>> [str(range(7)[share_of(rank, 3, 7)]) for rank in range(3)]
    ['range(0, 2)', 'range(2, 4)', 'range(4, 7)']
    """
    return slice(rows * rank // size, rows * (rank + 1) // size)


class Ranks:
    """This process among the others.

    Args:
        communicator: an mpi4py communicator, such as ``MPI.COMM_WORLD``, all of whose processes make the same calls; or
            None for a process that is alone.

    Raises:
        ImportError: there is no mpi4py.
        TypeError: it is no communicator.
    """

    def __init__(self, communicator: Any = None) -> None:
        self.communicator, self.rank, self.size = communicator, 0, 1
        if communicator is not None:
            try:
                from mpi4py import MPI
            except ImportError as error:
                raise ImportError(f"communicator: {INSTALL} ({error})") from error
            if not isinstance(communicator, MPI.Intracomm):
                raise TypeError(
                    "communicator: expected one of mpi4py, such as MPI.COMM_WORLD after `from mpi4py import MPI`, got "
                    f"{shown(communicator)}"
                )
            self._in_place = MPI.IN_PLACE
            self.rank, self.size = communicator.Get_rank(), communicator.Get_size()
            self.communicator = self._beside(communicator, MPI.Comm.Create_keyval)
        self.ending = False  # all ranks know that this training fails, and how
        self.signal: int | None = None  # one that has come to this rank
        self.agreed_signal: int | None = None  # one that all ranks end for
        self._said: tuple[Any, Array, str] | None = None  # a request, what it sums, and what failed here
        self._device: Any = None  # NCCL's communicator, where arrays are on a GPU

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def _beside(self, communicator: Any, create_key: Callable[[], int]) -> Any:
        """A duplicate of ``communicator``, so that messages are never taken for the caller's; it is made once."""
        if not _keys:
            _keys.append(create_key())
        own = communicator.Get_attr(_keys[0])
        if own is None:
            own, request = communicator.Idup()
            self._wait_patiently(request)
            communicator.Set_attr(_keys[0], own)
        return own

    def share(self, rows: int) -> slice:
        """This rank's part of a batch (see `share_of`)."""
        return share_of(self.rank, self.size, rows)

    def broadcast(self, value: Any) -> Any:
        """What rank 0 gives, on all ranks."""
        if self.size == 1:
            return value
        self.wait_for_all()
        return self.communicator.bcast(value, 0)

    def total(self, number: int) -> int:
        """The sum of all ranks' numbers."""
        return sum(self._everybodys(number))

    def _everybodys(self, value: Any) -> list[Any]:
        """What each rank gives, on all ranks."""
        if self.size == 1:
            return [value]
        self.wait_for_all()
        return self.communicator.allgather(value)

    def processes(self) -> str:
        """Who is who, for people: when a process is killed, ``mpiexec`` says its number."""
        places = self._everybodys(f"process {os.getpid()} on {platform.node()}")
        return ", ".join(f"rank {rank} is {place}" for rank, place in enumerate(places))

    def wait_for_all(self) -> None:
        """Go on when all ranks have come here."""
        if self.size > 1:
            self._wait_patiently(self.communicator.Ibarrier())

    def _wait_patiently(self, request: Any) -> None:
        """Wait, and say so if it takes long."""
        if not self.wait(request, PATIENCE):
            text = f"{self} waits for the others: all of them must call npnet.fit, as often, and one after the other"
            print(text, file=sys.stderr, flush=True)
            self.wait(request)

    @staticmethod
    def wait(request: Any, seconds: float = math.inf) -> bool:
        """As ``request.Wait()``, but Python hears signals meanwhile, and those who work soon have the cores.

        Returns:
            Whether it is done; False if that would take longer than ``seconds``.
        """
        for _ in range(1000):  # less than a millisecond
            if request.Test():
                return True
        began = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - began
            if waited > seconds:
                return False
            time.sleep(0 if waited < 0.05 else 0.002)
        return True

    def alike(self, said: Mapping[str, Any]) -> None:
        """Refuse to go on where ranks say different things.

        Args:
            said: JSON, by name.

        Raises:
            ValueError: two differ; on all ranks, naming one that differs from rank 0, and in what.
        """
        everybody = self._everybodys(said)
        for rank, other in enumerate(everybody):
            unlike = difference(everybody[0], other, places=("on rank 0", f"on rank {rank}"))
            if unlike:
                self.ending = True
                raise ValueError(f"all ranks must train alike: {unlike}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all ranks do, each for itself: if it fails on one, it fails on all.

        Raises:
            Exception: what was raised here.
            RankFailed: nothing was raised here, but something on another rank.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        diverged = isinstance(failure, TrainingDiverged)
        everybody = self._everybodys(("" if failure is None else _text(failure), diverged))
        if any(text for text, _ in everybody):
            self.ending = True
            if self.size > 1 and all(diverged for text, diverged in everybody if text):  # the same kind on all ranks
                rank, text = next((rank, text) for rank, (text, _) in enumerate(everybody) if text)
                raise RankDiverged(f"rank {rank} of {self.size}: {text.removeprefix('TrainingDiverged: ')}") from None
            raise self._failed([text for text, _ in everybody]) if failure is None else failure

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Inside it, an error that the other ranks do not know of ends them all; the message names this one.

        The message is printed, and ``MPI_Abort`` called: the others may be anywhere.
        """
        self.ending = False
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not self.ending:
                self.abort(error)
            raise

    def abort(self, error: BaseException) -> None:
        """End all ranks, saying why."""
        sys.stdout.flush()
        stream = sys.__stderr__ or sys.stderr  # the command line silences all ranks but one
        if not isinstance(error, (OSError, MemoryError, TrainingDiverged, KeyboardInterrupt, SystemExit)):
            traceback.print_exception(error, file=stream)
        print(f"{self} failed: {_text(error)}", file=stream, flush=True)
        self.communicator.Abort(1)

    def announce(self, loss: float, failure: BaseException | None = None) -> None:
        """Begin to tell the others this rank's part of the loss, that it failed, or that a signal came."""
        text = "" if failure is None else _text(failure)
        # (loss, failures, interrupts, requests to terminate), summed over the ranks
        said = np.array([loss, bool(text), self.signal == signal.SIGINT, self.signal == signal.SIGTERM], np.float64)
        self._said = self.communicator.Iallreduce(self._in_place, said), said, text

    @property
    def announced(self) -> bool:
        """Whether this step's announcement is under way."""
        return self._said is not None

    def agree(self, where: Callable[[], str]) -> float:
        """Wait for what all have announced. Nothing has been updated yet, nor is any other message under way.

        Args:
            where: says where the numbers of this rank cease to be finite; called only if some do.

        Returns:
            The loss: the sum of all ranks' parts.

        Raises:
            RankDiverged, RankFailed: on all ranks (but the one that failed, which knows).
        """
        assert self._said is not None
        (request, said, text), self._said = self._said, None
        own = float(said[0])
        self.wait(request)
        loss, failures, interrupts, terminations = (float(each) for each in said)
        if failures or not math.isfinite(loss):
            self.ending = True
            everybody = self._everybodys((text, own, where()))
            if failures:
                raise self._failed([text for text, _, _ in everybody])
            for rank, (_, part, there) in enumerate(everybody):
                self._check_part(part, f"the loss of rank {rank} of {self.size}", there)
            self._check_part(loss, "the sum of all ranks' losses", "each of them is finite")
        self.agreed_signal = signal.SIGINT if interrupts else signal.SIGTERM if terminations else None
        self.ending = self.agreed_signal is not None
        return loss

    def any_signal(self, number: int | None) -> int | None:
        """On all ranks the same: a signal that has come to one of them, and ends them all, or None."""
        came = [each for each in self._everybodys(number) if each is not None]
        self.ending = bool(came)
        return came[0] if came else None

    def start_sum(self, buffer: Array) -> Any:
        """Begin to replace ``buffer``, (numbers,), by the sum of all ranks'; returns the request to wait for."""
        if array_module(buffer) is np:
            return self.communicator.Iallreduce(self._in_place, buffer)
        if self._device is None:
            from mpi4py import MPI

            from npnet.device_ranks import DeviceRanks

            if self.size != MPI.COMM_WORLD.Get_size():
                raise BackendUnavailable("communicator: on GPUs expected MPI.COMM_WORLD, got a part of it")
            self._device = DeviceRanks(array_module(buffer), self.rank, self.size)
        return self._device.start_sum(buffer)

    def _failed(self, texts: list[str]) -> RankFailed:
        rank = next(rank for rank, text in enumerate(texts) if text)
        return RankFailed(f"rank {rank} of {self.size} failed: {texts[rank]}")

    def _check_part(self, loss: float, what: str, where: str) -> None:
        try:
            check_finite(loss, what)
        except TrainingDiverged as error:
            raise RankDiverged(f"{error}; {where}") from None


def _text(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
