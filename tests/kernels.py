"""CuPy's RawKernel on the CPU: the very source that is to run on a GPU, compiled by the machine's C compiler.

One thread does the work of all, but for kernels whose threads exchange numbers: there four of them, for 32 of a GPU, go
in step.
"""

import ctypes
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

COMPILER = shutil.which("cc")
HEADER = """#include <stdbool.h>
#include <tgmath.h>
#include <pthread.h>
typedef struct {long long x, y;} Index;
static const Index blockDim = {LANES};
static _Thread_local Index blockIdx, threadIdx;
static Index gridDim;
static pthread_barrier_t step;
static double shown[LANES];
static double exchanged(double value, int distance) {
    shown[threadIdx.x] = value;
    pthread_barrier_wait(&step);
    double other = shown[threadIdx.x ^ distance];
    pthread_barrier_wait(&step);
    return other;
}
#define __shfl_xor_sync(mask, value, distance) exchanged(value, distance)
#define __global__
"""
DRIVER = """
static long long blocks, ys;
%(statics)s
static void* thread(void* number) {
    threadIdx.x = (long long)number;
    for (blockIdx.y = 0; blockIdx.y < ys; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) %(name)s(%(statics_names)s);
    return NULL;
}
void run(long long x, long long threads, long long y, %(parameters)s) {
    blocks = x * threads / (LANES > 1 ? 32 : 1), ys = y;  // as many rows as 32 threads each can do
    %(copies)s
    gridDim.x = blocks, gridDim.y = ys;
    pthread_barrier_init(&step, NULL, LANES);
    pthread_t others[LANES];
    for (long long i = 1; i < LANES; i++) pthread_create(&others[i], NULL, thread, (void*)i);
    thread((void*)0);
    for (long long i = 1; i < LANES; i++) pthread_join(others[i], NULL);
}
"""


class RawKernel:
    """cupy.RawKernel."""

    launches: ClassVar[list[str]] = []
    compiled: ClassVar[list[str]] = []

    def __init__(self, code: str, name: str, options: tuple[str, ...] = ()) -> None:
        assert options == ("--fmad=false",)
        self.code = code
        self.compiled.append(code)
        code = code.replace("const __grid_constant__ ", "")
        said = re.search(rf'extern "C" __global__ void {name}\((.*?)\)', code)
        assert said is not None
        parameters = [part.strip() for part in said[1].split(",")]
        names = [part.split()[-1] for part in parameters]
        driver = DRIVER % {
            "name": name,
            "parameters": said[1],
            "statics": "\n".join(f"static {part.rsplit(' ', 1)[0]} s_{part.split()[-1]};" for part in parameters),
            "statics_names": ", ".join(f"s_{each}" for each in names),
            "copies": " ".join(f"s_{each} = {each};" for each in names),
        }
        source = HEADER + code.replace('extern "C" ', "static ") + driver
        lanes = 4 if "LANES" in code else 1  # a power of two; the device has 32
        with tempfile.TemporaryDirectory() as folder:
            file, library = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
            file.write_text(source)
            assert COMPILER is not None
            options = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", f"-DLANES={lanes}"]
            command = [COMPILER, *options, str(file), "-o", str(library), "-lm"]
            subprocess.run(command, check=True)
            self.run = ctypes.CDLL(str(library)).run

    def __call__(self, grid: tuple[int, ...], block: tuple[int], args: tuple[Any, ...]) -> None:
        self.launches.append(self.code)
        given: list[Any] = [ctypes.c_longlong(grid[0]), ctypes.c_longlong(block[0])]
        given.append(ctypes.c_longlong(grid[1] if len(grid) > 1 else 1))
        for each in args:
            if isinstance(each, np.uint32):
                given.append(ctypes.c_uint(int(each)))
            elif isinstance(each, np.uint64):
                given.append(ctypes.c_ulonglong(int(each)))
            elif isinstance(each, np.float64):
                given.append(ctypes.c_double(float(each)))
            elif isinstance(each, np.ndarray):
                assert each.size == 1, "CuPy passes no other host array"
                assert each.nbytes <= 4000, "a kernel takes no more"
                by_value = type("ByValue", (ctypes.Structure,), {"_fields_": [("bytes", ctypes.c_char * each.nbytes)]})
                given.append(by_value.from_buffer_copy(each))
            else:
                given.append(ctypes.c_void_p(each._data.ctypes.data))
        self.run(*given)
