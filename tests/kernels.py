"""CuPy's RawKernel on the CPU: the very source that is to run on a GPU, compiled by the machine's C compiler."""

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
static struct {long long x;} blockIdx, blockDim = {1}, threadIdx = {0};
#define __global__
"""


class RawKernel:
    """cupy.RawKernel: thread after thread."""

    launches: ClassVar[list[str]] = []
    compiled: ClassVar[list[str]] = []

    def __init__(self, code: str, name: str, options: tuple[str, ...] = ()) -> None:
        assert options == ("--fmad=false",)
        said = re.search(rf'extern "C" __global__ void {name}\((.*?)\)', code)
        assert said is not None
        self.code, self.compiled_code = code, self.compiled.append(code)
        names = ", ".join(part.split()[-1] for part in said[1].split(","))
        driver = (
            f"void run(long long blocks, long long threads, {said[1]}) {{\n"
            f"    for (blockIdx.x = 0; blockIdx.x < blocks * threads; blockIdx.x++) {name}({names});\n}}\n"
        )
        source = HEADER + code.replace('extern "C" ', "static ") + driver
        with tempfile.TemporaryDirectory() as folder:
            file, library = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
            file.write_text(source)
            assert COMPILER is not None
            command = [COMPILER, "-O1", "-ffp-contract=off", "-shared", "-fPIC", str(file), "-o", str(library), "-lm"]
            subprocess.run(command, check=True)
            self.run = ctypes.CDLL(str(library)).run

    def __call__(self, grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
        self.launches.append(self.code)
        given: list[Any] = [ctypes.c_longlong(grid[0]), ctypes.c_longlong(block[0])]
        for each in args:
            if isinstance(each, np.int64):
                given.append(ctypes.c_longlong(int(each)))
            elif isinstance(each, np.float64):
                given.append(ctypes.c_double(float(each)))
            else:
                given.append(ctypes.c_void_p(each._data.ctypes.data))
        self.run(*given)
