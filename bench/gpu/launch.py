"""What staging costs the host on a faked device.

    python -m piecework.bench.gpu.launch

It compiles the kernel for an H100 and a stand-in for ``libcuda`` whose functions succeed and count launches; so a C compiler must be
there, and no GPU. Copies run on the CPU. What a driver takes for a launch, some microseconds each, is in none of the figures.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from piecework.bench.gpu.parts import to_stage
from piecework.bench.measure.timing import measure
from piecework.errors import PieceworkError, UsageError
from piecework.runtime.graphs.stage.inputs import StaticInputs

_DRIVER = r"""
#include <stddef.h>
static long launches, grid[2]; static unsigned long long source;
long fake_launches(void) { return launches; }
long fake_grid(int dim) { return grid[dim]; }
unsigned long long fake_source(void) { return source; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuCtxGetLimit(size_t *v, int l) { *v = 1 << 20; return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 232448; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = 1024; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "no error of a fake"; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *n) { *f = (void *)2; return 0; }
int cuModuleLoadData(void **m, const void *d) { *m = (void *)3; return 0; }
int cuOccupancyMaxActiveClusters(int *n, void *f, const void *c) { *n = 1; return 0; }
int cuStreamIsCapturing(void *s, int *c) { *c = 0; return 0; }
int cuPointerGetAttribute(unsigned long long *d, int a, unsigned long long p) { *d = p; return 0; }
int cuLaunchKernelEx(const unsigned *config, void *f, void **arguments, void **extra) {
  launches++, grid[0] = config[0], grid[1] = config[1], source = *(unsigned long long *)arguments[0];
  return 0;
}
"""
_NOTHING = [
    "cuInit",
    "cuCtxSetCurrent",
    "cuCtxSetLimit",
    "cuFuncSetAttribute",
    "cuFuncSetCacheConfig",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
    "cuTensorMapEncodeIm2col",
]


def fake_driver(folder: Path) -> ctypes.CDLL:
    """Build and load the stand-in by the driver's name, and let Triton launch through it."""
    text = _DRIVER + "".join(f"int {name}() {{ return 0; }}\n" for name in _NOTHING)
    (folder / "driver.c").write_text(text, encoding="utf-8")
    made = folder / "libcuda.so.1"
    build = ["-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(made)]
    subprocess.run([os.environ.get("CC", "cc"), *build, str(folder / "driver.c")], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    driver = ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
    driver.fake_source.restype = ctypes.c_ulonglong
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver as triton_driver

    triton_driver.set_active(CudaDriver())
    return driver


def ways(inputs: int, driver: ctypes.CDLL) -> dict[str, Callable[[], object]]:
    """Each way to stage ``inputs`` tensors of two dtypes, 37 rows padded to 40."""
    examples, tensors, plain = to_stage(inputs, 37, "cpu")
    each, kernel = (StaticInputs.allocate(examples, 256, kernel=k) for k in ("reference", "triton"))
    together = StaticInputs.allocate(examples, 256, keeps_tails=True)

    kernel.stage_alike(tensors, 40, 37)
    before = driver.fake_launches()
    kernel.stage_alike(tensors, 40, 37)
    seen = [driver.fake_launches() - before, driver.fake_grid(0), driver.fake_grid(1)]
    if [*seen, driver.fake_source()] != [1, 1, inputs, tensors[0].data_ptr()]:
        raise PieceworkError(f"the kernel was not launched as it should be: {seen}")
    return {
        "plain copies": plain,
        "a copy and a fill each": lambda: each.stage(tensors, 40),
        "together, tails kept": lambda: together.stage_alike(tensors, 40, 37),
        "one kernel": lambda: kernel.stage_alike(tensors, 40, 37),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table.

    Raises:
        UsageError: there is a GPU, whose driver is not replaced.
    """
    parser = argparse.ArgumentParser(prog="python -m piecework.bench.gpu.launch")
    parser.add_argument("--window", type=float, default=0.002, help="seconds of calls at a time")
    options = parser.parse_args(arguments)
    if torch.cuda.is_available():
        raise UsageError("there is a GPU", hint="python -m piecework.bench.gpu --part staging")
    fakes = {
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0),
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
    }
    raw = mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True)
    with tempfile.TemporaryDirectory() as name, mock.patch.multiple(torch.cuda, **fakes), raw:
        driver = fake_driver(Path(name))
        for inputs in (1, 2, 8):
            steps = ways(inputs, driver)
            timings = measure(steps, rounds=40, window=options.window, clock=time.perf_counter)
            for way, timing in timings.items():
                print(f"{inputs} inputs  {way}: {timing.best * 1e6:.2f} µs", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
