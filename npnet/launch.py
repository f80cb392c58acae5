"""Was this process started by ``mpiexec``? Asked before NumPy is loaded, which reads its number of threads only once.

Several processes on one machine share its cores. Each with a BLAS thread for every core would spend its time waiting
for the others, so each takes its part of the cores, unless the environment says otherwise.
"""

import ctypes
import os
import platform
import signal
import sys
import warnings
from contextlib import suppress
from typing import NamedTuple

PR_SET_PDEATHSIG = 1  # of Linux's prctl

THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

RANK_SIZE_LOCAL = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_SIZE", "LOCAL_RANK")),  # Open MPI
)
"""What launchers say in the environment."""


class Launch(NamedTuple):
    """Which process this is, of how many, of how many on this machine, and which of these."""

    rank: int
    size: int
    local_size: int
    local_rank: int = 0


def launched() -> Launch | None:
    """What the launcher says, if there is one and it has started more than one process."""
    for names in RANK_SIZE_LOCAL:
        rank, size, local_size, local_rank = (
            int(text) if text.isdecimal() else None for text in (os.environ.get(name, "") for name in names)
        )
        if rank is not None and size is not None and size > 1:
            return Launch(rank, size, local_size or size, local_rank or 0)
    return None


def share_cores(launch: Launch | None) -> None:
    """Set the number of BLAS threads to this process's part of the cores, if nobody has."""
    if launch is None or "numpy" in sys.modules or any(name in os.environ for name in THREADS):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in THREADS:
        os.environ[name] = str(max(1, cores // max(1, launch.local_size)))


def supervise(launch: Launch) -> None:
    """Go on in a child process; this one stays behind, to say which rank it was if the child is killed.

    Who is killed cannot say so, and ``mpiexec`` ends the others at once, naming any of them. Signals are the child's:
    they are sent to the group of processes that both are in.
    """
    if not hasattr(os, "fork"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # BLAS has threads, which it starts anew in a child
        child = os.fork()
    if not child:
        with suppress(OSError, AttributeError):  # Linux: this one is killed with the one that stays behind
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        os._exit(code)
    name = signal.Signals(-code).name
    sys.stderr.write(
        f"rank {launch.rank} of {launch.size}, process {child} on {platform.node()}, was killed ({name})\n"
    )
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)  # so that the launcher ends the others


share_cores(launched())
