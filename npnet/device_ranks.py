"""Sums over the ranks of what is on GPUs: NCCL, through CuPy's distributed module, on a stream of its own.

Nothing here waits on the host: a sum begins when the gradients before it are there, and what comes after it on the
device waits for it there. MPI only introduces the ranks to each other; each has a GPU of its own.
"""

from typing import Any

from npnet.backend import Array, Backend, BackendUnavailable
from npnet.launch import Launch


def take_device(backend: Backend, launch: Launch | None) -> None:
    """Work on the GPU that is this rank's, from now on: each has one of its own, where there are enough."""
    if launch is not None and hasattr(backend.xp, "cuda"):
        cuda = backend.xp.cuda
        cuda.Device(launch.local_rank % cuda.runtime.getDeviceCount()).use()


class DeviceRanks:
    """The ranks' GPUs.

    Args:
        xp: the array module, ``cupy``.
        rank, size: this process in ``MPI.COMM_WORLD``.

    Raises:
        BackendUnavailable: CuPy has no NCCL.
    """

    def __init__(self, xp: Any, rank: int, size: int) -> None:
        try:
            from cupyx.distributed import init_process_group

            self._group = init_process_group(size, rank, use_mpi=True)
        except (ImportError, RuntimeError) as error:
            raise BackendUnavailable(
                f"several ranks on GPUs need NCCL, which CuPy does not find ({error}): install the package "
                "nvidia-nccl-cu12 (or -cu13), or train on the CPU"
            ) from error
        self._cuda = xp.cuda
        self._stream = xp.cuda.Stream(non_blocking=True)

    def start_sum(self, buffer: Array) -> "DeviceSum":
        """Begin to replace ``buffer``, (numbers,), by the sum of all ranks'."""
        ready, done = self._cuda.Event(disable_timing=True), self._cuda.Event(disable_timing=True)
        ready.record(self._cuda.get_current_stream())
        self._stream.wait_event(ready)
        self._group.all_reduce(buffer, buffer, "sum", self._stream)
        done.record(self._stream)
        return DeviceSum(self._cuda, done)


class DeviceSum:
    """A sum under way, with the methods of an MPI request."""

    def __init__(self, cuda: Any, done: Any) -> None:
        self._cuda, self._done = cuda, done

    def Test(self) -> bool:  # noqa: N802 - MPI's name
        """Whether it is there."""
        return bool(self._done.done)

    def Wait(self) -> None:  # noqa: N802 - MPI's name
        """Let what follows on the device wait for it."""
        self._cuda.get_current_stream().wait_event(self._done)
