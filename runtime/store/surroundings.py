"""What decides compiled code besides its graph, as texts by group and name, for keys and saved
programs alike.

`surroundings` is the one list: a factor that is added there counts for the compile cache, for
artifacts and when they are loaded. Nothing that can't be told is left out: it is an error.
"""

from __future__ import annotations

import importlib.util
import linecache
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import torch
import torch.fx
from torch._ops import HigherOrderOperator

from piecework.codegen.graph.origin import value_of
from piecework.codegen.graph.schemas import every_node, overloads_of
from piecework.errors import ArtifactError, CacheError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.store.digest import canonical, digest_of, text_of
from piecework.runtime.store.factors import KeyFactors, content_key
from piecework.runtime.store.files import sha256
from piecework.runtime.torch_compat.settings import global_passes, torch_options, torch_settings

Factors = Mapping[str, Mapping[str, str]]


def surroundings(*graphs: torch.fx.GraphModule, settings: Mapping[str, str]) -> Factors:
    """Everything of this process that decides what is compiled for ``graphs``, by group and name.

    Args:
        settings: how torch is set, or was when it compiled; see `settings_factors`.
    """
    return {
        "versions": versions(),
        "device": {
            **host_factors(),
            **accelerators(*graphs),
            "threads": str(torch.get_num_threads()),
        },
        "environment": environment_factors(),
        "torch": settings,
    }


#: Factors that a saved program need not share: each call looks at them, or they decide speed alone.
_FREE = {("device", "threads"), ("torch", "autocast"), ("torch", "torch's options")}
#: Factors of which everything that was there must be here, and there may be more.
_AT_LEAST = {("device", "cpu_features"), ("device", "cuda")}


def require_same_surroundings(saved: Factors) -> None:
    """Raise `ArtifactError` where a program was compiled in other surroundings than these, of which
    it names the first.

    Raises:
        Unidentifiable: torch is set to something that has no stable form.
    """
    here = {**surroundings(settings=settings_factors(every=False))}
    if "cuda" in saved.get("device", {}) and torch.cuda.is_available():
        each = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        here["device"] = {**here["device"], "cuda": _cuda(each)}
    for difference in KeyFactors(here).differences(KeyFactors(saved)):
        place = difference.group, difference.name
        was, now = (each or "" for each in (difference.cached, difference.current))
        lacking = " ".join(sorted(set(was.split()) - set(now.split())))
        if place in _FREE or (place in _AT_LEAST and not lacking):
            continue
        what = (
            f"this machine lacks {lacking}"
            if place in _AT_LEAST
            else f"and here it is {now or 'not set'}"
        )
        raise ArtifactError(
            f"the artifact was made with {difference.name} {was or 'not set'}, {what}",
            where=difference.group,
            hint="compile the model again; with artifact=path this happens by itself",
        )


def processes() -> dict[str, int]:
    """This process among those that run one model together."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return {"rank": 0, "world": 1}
    return {"rank": distributed.get_rank(), "world": distributed.get_world_size()}


# --- versions ----------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of Python, torch, Triton and piecework, whose sources count too."""
    found = {"python": sys.implementation.cache_tag or "", "piecework sources": _OWN_SOURCES}
    for name in ("torch", "triton", "piecework"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    # A torch that was built from source has the same version for many states.
    found["torch"] = f"{torch.__version__} {getattr(torch.version, 'git_version', '')}".strip()
    return found


def tree_digest(directory: str | os.PathLike[str]) -> str:
    """One SHA-256 over every source file below ``directory``, by relative path and content."""
    root = Path(directory)
    paths = (each for each in root.rglob("*") if each.suffix in (".py", ".jinja"))
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return content_key(*(part for name, path in named for part in (name, path.read_bytes())))


_PACKAGE = Path(__file__).resolve().parents[2]
_ROOMS = ("codegen", "templates", "runtime")
# As they are when they are loaded: what is edited later does not run in this process.
_OWN_SOURCES = content_key(*(tree_digest(_PACKAGE / room) for room in _ROOMS))


# --- the machine -------------------------------------------------------------------------------------

# Features that compilers and kernels choose code by; the rest of the kernel's list varies with its version.
_CPU_FEATURE = re.compile(
    r"(avx|amx|sse|ssse|fma|f16c|bmi|popcnt|gfni|vaes|vpclmul|asimd|neon|sve|sme|bf16|i8mm|fphp|dotprod|vx)\w*"
)


def host_factors(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """System, machine and the vector instructions of the CPU."""
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


def accelerators(*graphs: torch.fx.GraphModule) -> dict[str, str]:
    """The GPUs that ``graphs`` compute on; graphs of the CPU ask for none."""
    devices = {
        leaf.device
        for graph in graphs
        for node in graph.graph.nodes
        for leaf in torch_compat.flatten_tree(value_of(node))[0]
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"
    }
    return {"cuda": _cuda(map(torch.cuda.get_device_capability, devices))} if devices else {}


def _cuda(capabilities: Iterable[tuple[int, int]]) -> str:
    names = (f"sm_{major}{minor}" for major, minor in sorted(set(capabilities)))
    return " ".join([str(torch.version.cuda), *names])


# --- the environment and torch's settings ------------------------------------------------------------

# Variables that change what Inductor or Triton emit. Read off torch's and triton's configuration modules.
_ENVIRONMENT_NAMES = frozenset(
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
# Inductor has a variable for most of its options and gains more each release; those count that are not known to say where, how fast or how loudly
# it compiles, but not what.
_NO_EFFECT = re.compile(
    r"TORCHINDUCTOR_("
    r".*CACHE.*|.*_DIR|.*TIMEOUT.*|.*LOG.*|.*METRIC.*|.*SUBPROC.*|.*NUM_CHOICES_DISPLAYED"
    r"|COMPILE_THREADS|WORKER_.*|QUIESCE_ASYNC_COMPILE_POOL|AUTOTUNE_MULTI_DEVICE"
    r"|PRECOMPILATION_.*|WARN_MIX_LAYOUT|SAVE_ARGS|MAX_AUTOTUNE_REPORT_CHOICES_STATS"
    r"|USE_EXPERIMENTAL_BENCHMARKER|USE_TORCH_PROFILER_BENCHMARKER|TRITON_PROTON_.*"
    r"|DEBUG_FUSION|AUTOHEURISTIC_COLLECT|COLLECTIVE_BENCHMARK_.*"
    r")"
)


def environment_factors(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that decide what is compiled and are set, sorted."""
    env = os.environ if environ is None else environ

    def counts(name: str) -> bool:
        inductors = name.startswith("TORCHINDUCTOR_") and not _NO_EFFECT.fullmatch(name)
        return inductors or name in _ENVIRONMENT_NAMES

    return {name: env[name] for name in sorted(env) if counts(name)}


def settings_factors(*, every: bool = True) -> dict[str, str]:
    """Setting → value as text: ambient modes, torch's switches and configurations, and code that
    was put into them.

    Args:
        every: see `piecework.runtime.torch_compat.settings.torch_options`.

    Raises:
        Unidentifiable: an option, a pass or a lowering that somebody set has no stable form.
    """
    options, changed = torch_options(every=every)
    settings = {**torch_settings(), **changed}
    found = {name: text_of(canonical(each, f"torch's {name}")) for name, each in settings.items()}
    found["torch's options"] = digest_of(sorted(options.items()), "torch's options")
    passes = global_passes(every=every)
    return found | {name: digest_of(each, f"torch.{name}") for name, each in passes.items()}


# --- operators ---------------------------------------------------------------------------------------

# Higher-order operators that hold all they do as subgraphs and literals. Others look things up in
# tables of the process, as those for Triton kernels do.
SELF_CONTAINED = frozenset(
    {
        *("associative_scan", "auto_functionalized", "auto_functionalized_v2", "cond"),
        *("flex_attention", "invoke_subgraph", "map_impl", "out_dtype", "scan", "while_loop"),
        *("wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled"),
    }
)


def operator_facts(graph: torch.fx.GraphModule) -> tuple[str, str]:
    """What the compiled form of a piece depends on besides its structure.

    Returns:
        The content of each operator that is not torch's, with what its fake says of the results;
        and why the compiled form holds for this process only, "" if it does not.
    """
    lines: list[str] = []
    for node in every_node(graph):
        higher = node.target if isinstance(node.target, HigherOrderOperator) else None
        if higher is not None and higher.name() not in SELF_CONTAINED:
            return "", f"{higher.name()} may depend on this process"
        for op in overloads_of(node.target):
            if torch_compat.is_torch_operator(op):
                continue
            if not torch_compat.is_opaque_to_inductor(op):
                return "", f"{op} is compiled with its body"
            try:
                identity = digest_of(op, str(op))
            except Unidentifiable as error:
                return "", error.message
            value = value_of(node)
            many = value if isinstance(value, (tuple, list)) else [value]
            results = ", ".join(map(_signature, many))
            lines.append(f"{op} {op._schema} {identity} -> {results}")
    return "\n".join(lines), ""


def _signature(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"
    return str(value)


# --- sources -----------------------------------------------------------------------------------------

_FRAME_FILE = re.compile(r'^\s*File "([^"\n]+)", line \d+', re.MULTILINE)
_TORCH = os.path.dirname(os.path.realpath(torch.__file__)) + os.sep
_PYTHON = (sysconfig.get_path("stdlib") + os.sep, os.path.dirname(os.__file__) + os.sep)
_OWN = tuple(f"{_PACKAGE / room}{os.sep}" for room in (*_ROOMS, "integrations"))


def is_foreign(file: str) -> bool:
    """Whether a file is neither torch's, Python's nor ours, which count by their versions."""
    path = os.path.realpath(file)
    if path.startswith((_TORCH, *_OWN)):
        return False
    return not path.startswith(_PYTHON) or "-packages" + os.sep in path


def traced_files(graph: torch.fx.GraphModule) -> set[str]:
    """The source files that Dynamo traced through, by the stack traces of its nodes."""
    traces = (node.meta.get("stack_trace") for node in graph.graph.nodes)
    return {file for each in traces if isinstance(each, str) for file in _FRAME_FILE.findall(each)}


def source_factors(files: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """The SHA-256 of each source file that `is_foreign`, by the name of its module; a moved source
    tree has the same.

    A file called ``<...>`` (a notebook cell, generated code) is looked up in linecache, since there
    is none.

    Raises:
        CacheError: a source cannot be read, so that a change of it would go unseen.
    """
    modules = {getattr(each, "__file__", None): name for name, each in [*sys.modules.items()]}
    named: dict[str, set[str]] = {}  # scripts of one name in two folders both count
    for file in filter(is_foreign, set(map(os.fspath, files))):
        name = modules.get(file, "__main__")  # which is another one in another process
        name = _module_name(file) if name == "__main__" else name
        named.setdefault(name, set()).add(sha256(_source(file)))
    return {
        f"{name}#{number}" if number else name: digest
        for name, digests in sorted(named.items())
        for number, digest in enumerate(sorted(digests))
    }


def _module_name(file: str) -> str:
    """The name that a file's module has by its packages."""
    if file.startswith("<"):
        return "<dynamic>"
    path = Path(os.path.realpath(file)).with_suffix("")
    parts = [path.name]
    for parent in path.parents:
        if not (parent / "__init__.py").is_file():
            break
        parts.append(parent.name)
    return ".".join(reversed(parts)).removesuffix(".__init__")


def _source(file: str) -> bytes:
    try:
        if os.path.exists(file):
            return Path(file).read_bytes()
        found = "".join(linecache.getlines(file)).encode()
        why = "" if found else "it is in no file"
    except OSError as error:
        why = str(error.strerror)
    if why:
        raise CacheError(
            f"a traced function has no source, so that its changes would go unseen: {why}",
            where=file,
            hint="put it into a file, or switch the cache off for this model",
        )
    return found


def require_same_sources(saved: Mapping[str, str]) -> None:
    """Raise `ArtifactError` where a module that the trace went through has another text now."""
    for name, digest in saved.items():
        now = source_of_module(name)
        if now is None or sha256(now) != digest:
            what = "is not here" if now is None else "has another text now"
            raise ArtifactError(
                f"the model's source changed: module {name} {what}",
                where=name,
                hint="compile the model again; with artifact=path this happens by itself",
            )


def source_of_module(name: str) -> bytes | None:
    """The text of a module's file, whether it is imported or not; None where it is not found."""
    main = sys.modules.get("__main__")
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    script = getattr(main, "__file__", None)
    try:
        if file is None and isinstance(script, str) and Path(script).stem == name:
            file = script
        if file is None and module is None:
            file = getattr(importlib.util.find_spec(name), "origin", None)
        return None if file is None else Path(file).read_bytes()
    except (ImportError, ValueError, OSError):
        return None
