"""Was this process started by ``mpiexec``? Asked before NumPy is loaded, which reads its number of threads only once.

Several processes on one machine share its cores. Each with a BLAS thread for every core would spend its time waiting
for the others, so each takes its part of the cores, unless the environment says otherwise.
"""

import os
import sys
from typing import NamedTuple

THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

RANK_SIZE_LOCAL = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI
)
"""What launchers say in the environment."""


class Launch(NamedTuple):
    """Which process this is, of how many, and of how many on this machine."""

    rank: int
    size: int
    local_size: int


def launched() -> Launch | None:
    """What the launcher says, if there is one and it has started more than one process."""
    for rank, size, local in RANK_SIZE_LOCAL:
        said = [os.environ.get(name, "") for name in (rank, size)]
        if all(text.isdecimal() for text in said) and int(said[1]) > 1:
            local_size = os.environ.get(local, "")
            return Launch(int(said[0]), int(said[1]), int(local_size) if local_size.isdecimal() else int(said[1]))
    return None


def share_cores(launch: Launch | None) -> None:
    """Set the number of BLAS threads to this process's part of the cores, if nobody has."""
    if launch is None or "numpy" in sys.modules or any(name in os.environ for name in THREADS):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in THREADS:
        os.environ[name] = str(max(1, cores // max(1, launch.local_size)))


share_cores(launched())
