"""Collecting key factors. In: an environment, source files, installed packages, this machine. Out: names and values for `KeyFactors`.

It never imports torch: what only torch knows (device capability, thread count, its git version) the caller adds.
"""

from __future__ import annotations

import hashlib
import linecache
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from piecework.errors import CacheError
from piecework.runtime.cache.manifest import sha256

# Variables that change what Inductor or Triton emit. Read off torch's and triton's configuration modules.
ENVIRONMENT_NAMES = frozenset(
    {
        *("ATEN_CPU_CAPABILITY", "CUTEDSL_ENABLE_AUTOTUNING", "CUTLASS_EPILOGUE_FUSION"),
        *("DISABLE_PTXAS_OPT", "ENABLE_PERSISTENT_TMA_MATMUL", "ENABLE_TEMPLATE_TMA_STORE"),
        *("ENABLE_TMA_LOAD_FOR_TEMPLATE_EPILOGUE", "PTXAS_OPTIONS"),
        *("TORCHDYNAMO_AUTO_FUNCTIONALIZED_V2", "TORCHDYNAMO_CAPTURE_DYNAMIC_OUTPUT_SHAPE_OPS"),
        *("TORCHDYNAMO_CAPTURE_SCALAR_OUTPUTS", "TORCHDYNAMO_PREPARE_FREEZING"),
        *("TORCH_CUDA_ARCH_LIST", "TORCH_DYNAMO_DO_NOT_EMIT_RUNTIME_ASSERTS"),
        *("TRITON_ALLOW_NON_CONSTEXPR_GLOBALS", "TRITON_DEFAULT_FP_FUSION"),
        *("TRITON_F32_DEFAULT", "TRITON_INTERPRET", "TRITON_MOCK_PTX_VERSION"),
        *("TRITON_OVERRIDE_ARCH",),
    }
)
# Inductor has a variable for most of its options and gains more each release; one that is not known here counts.
ENVIRONMENT_PREFIXES = ("TORCHINDUCTOR_",)
# Of those, the ones that say where, how fast or how loudly it compiles, but not what.
_NO_EFFECT = re.compile(
    r"TORCHINDUCTOR_("
    r".*CACHE.*|.*_DIR|.*TIMEOUT.*|.*LOG.*|.*METRIC.*|.*SUBPROC.*|.*NUM_CHOICES_DISPLAYED"
    r"|COMPILE_THREADS|WORKER_.*|QUIESCE_ASYNC_COMPILE_POOL|AUTOTUNE_MULTI_DEVICE"
    r"|PRECOMPILATION_.*|WARN_MIX_LAYOUT|SAVE_ARGS|MAX_AUTOTUNE_REPORT_CHOICES_STATS"
    r"|USE_EXPERIMENTAL_BENCHMARKER|USE_TORCH_PROFILER_BENCHMARKER|TRITON_PROTON_.*"
    r"|DEBUG_FUSION|AUTOHEURISTIC_COLLECT|COLLECTIVE_BENCHMARK_.*"
    r")"
)
# Features that compilers and kernels choose code by; the rest of the kernel's list varies with its version.
_CPU_FEATURE = re.compile(
    r"(avx|amx|sse|ssse|fma|f16c|bmi|popcnt|gfni|vaes|vpclmul|asimd|neon|sve|sme|bf16|i8mm|fphp|dotprod|vx)\w*"
)
_CPUINFO = Path("/proc/cpuinfo")


def environment_factors(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of the allow-list that are set, sorted."""
    env = os.environ if environ is None else environ
    return {name: env[name] for name in sorted(env) if _counts(name)}


def source_factors(files: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """Return the SHA-256 of each traced source file by a name relative to the directory that holds its outermost package.

    That is the last one upwards with an ``__init__.py``. A file called ``<...>`` (a notebook cell, generated code) is looked up
    in linecache, since there is none.

    Raises:
        CacheError: a source cannot be read, so that a change of it would go unseen.
    """
    found: set[tuple[str, str]] = set()
    for file in files:
        name = os.fspath(file)
        if name.startswith("<") and name.endswith(">"):
            found.add(("<dynamic>", sha256(_dynamic_source(name))))
        else:
            path = Path(os.path.realpath(name))
            found.add((_portable_name(path), sha256(_read_source(path))))
    named: dict[str, str] = {}
    # Two different files may get one name (scripts of equal name in two folders); both count.
    for name, digest in sorted(found):
        number = 2
        unique = name
        while unique in named:
            unique = f"{name}#{number}"
            number += 1
        named[unique] = digest
    return named


def tree_digest(directory: str | os.PathLike[str]) -> str:
    """Return one SHA-256 over every source file below `directory`, by relative path and content.

    Fit for a package whose every change may change what it emits (piecework's own code generation).
    """
    root = Path(directory)
    digest = hashlib.sha256()
    paths = [
        path for path in root.rglob("*") if path.suffix in (".py", ".jinja") and path.is_file()
    ]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(sha256(_read_source(path)).encode())
    return digest.hexdigest()


def installed_versions(distributions: Iterable[str] = ("torch", "triton")) -> dict[str, str]:
    """Return Python's version and those of installed packages, from their metadata; "absent" for a missing one.

    A torch that was built from source has the same version for many states: add ``torch.version.git_version``.
    """
    versions = {"python": f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def host_factors(cpuinfo: Path = _CPUINFO) -> dict[str, str]:
    """Return system, machine and the vector instructions of the CPU: kernels built for more of them would crash here."""
    factors = {"system": platform.system(), "machine": platform.machine()}
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        # No list of features: the processor's name is coarser but safe.
        factors["cpu"] = platform.processor() or "unknown"
        return factors
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    features = line.group(1).split() if line else []
    factors["cpu_features"] = " ".join(sorted({f for f in features if _CPU_FEATURE.fullmatch(f)}))
    return factors


def _counts(name: str) -> bool:
    if name in ENVIRONMENT_NAMES:
        return True
    return name.startswith(ENVIRONMENT_PREFIXES) and _NO_EFFECT.fullmatch(name) is None


def _portable_name(path: Path) -> str:
    top = path.parent
    while (top / "__init__.py").is_file() and top != top.parent:
        top = top.parent
    return path.relative_to(top).as_posix()


def _read_source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CacheError(
            f"a traced source file cannot be read ({error.strerror}), so that its changes would go unseen",
            where=str(path),
            hint="switch the cache off for this model",
        ) from error


def _dynamic_source(name: str) -> bytes:
    lines = linecache.getlines(name)
    if not lines:
        raise CacheError(
            "a traced function has no source, so that its changes would go unseen",
            where=name,
            hint="put it into a file, or switch the cache off for this model",
        )
    return "".join(lines).encode()
