"""What decides compiled code besides its graph, as texts by group and name.

`surroundings` is what the compile cache asks on top of `machine`. What can't be told is an error.
"""

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
AGAIN = "compile the model again; with artifact=path this happens by itself"


def machine(*graphs: torch.fx.GraphModule) -> Factors:
    """By what and where code for ``graphs`` is compiled."""
    return {"versions": versions(), "device": {**host_factors(), **accelerators(*graphs)}}


def surroundings(*graphs: torch.fx.GraphModule) -> Factors:
    """Everything of this process that decides what is compiled for ``graphs``."""
    found = machine(*graphs)
    return {
        **found,
        "device": {**found["device"], "threads": str(torch.get_num_threads())},
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "torch": settings_factors(),
    }


def require_same_machine(saved: Factors) -> None:
    """Raise `ArtifactError` for a program that was compiled for what is not here."""
    here = {**machine()}
    if "cuda" in saved.get("device", {}) and torch.cuda.is_available():
        each = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        here["device"] = {**here["device"], "cuda": _cuda(each)}
    for difference in KeyFactors(here).differences(KeyFactors(saved)):
        was, now = (each or "not set" for each in (difference.cached, difference.current))
        what = f"and here it is {now}"
        if difference.name in ("cpu_features", "cuda"):
            lacking = sorted(set((difference.cached or "").split()) - set(now.split()))
            what = f"this machine lacks {' '.join(lacking)}"
            if not lacking:
                continue
        why = f"the artifact was made with {difference.name} {was}, {what}"
        raise ArtifactError(why, where=difference.group, hint=AGAIN)


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
    root, parts = os.fspath(directory), list[str | bytes]()
    found = (os.path.join(at, name) for at, _, names in os.walk(root) for name in names)
    for path in sorted(each for each in found if each.endswith((".py", ".jinja"))):
        with open(path, "rb", buffering=0) as file:  # half of the time that Path takes
            parts += [path[len(root) :].replace(os.sep, "/"), file.read()]
    return content_key(*parts)


_PACKAGE = Path(__file__).resolve().parents[2]
_ROOMS = ("codegen", "templates", "runtime")
# As they are when they are loaded: what is edited later does not run in this process.
_OWN_SOURCES = content_key(*(tree_digest(_PACKAGE / room) for room in _ROOMS))

# Features that compilers and kernels choose code by; the rest of the kernel's list varies with its version.
_CPU_FEATURE = re.compile(
    r"(avx|amx|sse|ssse|fma|f16c|bmi|popcnt|gfni|vaes|vpclmul|asimd|neon|sve|sme|bf16|i8mm|fphp|dotprod|vx)\w*"
)


def host_factors(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """System, machine and the vector instructions of the CPU."""
    factors = {"system": platform.system(), "machine": platform.machine()}
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:  # the processor's name is coarser but safe
        return {**factors, "cpu": platform.processor() or "unknown"}
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    features = {each for each in line[1].split() if _CPU_FEATURE.fullmatch(each)} if line else ()
    return {**factors, "cpu_features": " ".join(sorted(features))}


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


# Variables that change what is emitted and that no configuration of torch shows.
_ENVIRONMENT = (
    *("ATEN_CPU_CAPABILITY", "DISABLE_PTXAS_OPT", "PTXAS_OPTIONS", "TORCH_CUDA_ARCH_LIST"),
    *("TRITON_ALLOW_NON_CONSTEXPR_GLOBALS", "TRITON_DEFAULT_FP_FUSION", "TRITON_F32_DEFAULT"),
    *("TRITON_INTERPRET", "TRITON_MOCK_PTX_VERSION", "TRITON_OVERRIDE_ARCH"),
)


def settings_factors() -> dict[str, str]:
    """Torch's modes, switches, configurations and the code put into them, as texts by name."""
    options, changed = torch_options()
    settings = {**torch_settings(), **changed}
    found = {name: text_of(canonical(each, f"torch's {name}")) for name, each in settings.items()}
    found["torch's options"] = digest_of(sorted(options.items()), "torch's options")
    return found | {
        name: digest_of(each, f"torch.{name}") for name, each in global_passes().items()
    }


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
    """What the compiled form of a piece depends on besides its structure."""
    lines: list[str] = []
    for node in every_node(graph):
        higher = node.target if isinstance(node.target, HigherOrderOperator) else None
        if higher is not None and higher.name() not in SELF_CONTAINED:
            return "", f"{higher.name()} may depend on this process"
        for op in overloads_of(node.target):
            if torch_compat.is_torch_operator(op):
                continue
            # Of a pointwise one Inductor runs the body where all operands are constants.
            if not torch_compat.is_opaque_to_inductor(op) or torch.Tag.pointwise in op.tags:
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
    """The SHA-256 of each source file that `is_foreign`, by the name of its module."""
    modules = {getattr(each, "__file__", None): name for name, each in [*sys.modules.items()]}
    named: dict[str, set[str]] = {}  # scripts of one name in two folders both count
    for file in filter(is_foreign, set(map(os.fspath, files))):
        name = modules.get(file, "__main__")  # which is another one in another process
        if name == "__main__":  # a notebook's cells have numbers for names
            name = "<dynamic>" if file.startswith("<") else Path(os.path.realpath(file)).stem
        named.setdefault(name, set()).add(sha256(_source(file)))
    return {
        name: digests.pop() if len(digests) == 1 else content_key(*sorted(digests))
        for name, digests in sorted(named.items())
    }


def _source(file: str) -> bytes:
    lines = linecache.getlines(file) if not os.path.exists(file) else ()
    try:
        return "".join(lines).encode() if lines else Path(file).read_bytes()
    except OSError as error:
        why = f"a traced function has no source, and its changes would go unseen: {error.strerror}"
        hint = "put it into a file, or switch the cache off for this model"
        raise CacheError(why, where=file, hint=hint) from error


def require_same_sources(saved: Mapping[str, str]) -> None:
    """Raise `ArtifactError` where a module that the trace went through has another text now."""
    for name, digest in saved.items():
        now = _source_of_module(name)
        if now is None or sha256(now) != digest:
            what = "is not here" if now is None else "has another text now"
            why = f"the model's source changed: module {name} {what}"
            raise ArtifactError(why, where=name, hint=AGAIN)


def _source_of_module(name: str) -> bytes | None:
    """The text of a module's file, whether it is imported or not; None where it is not found."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    file = getattr(sys.modules.get(name), "__file__", None)
    try:
        if file is None and isinstance(script, str) and Path(script).stem == name:
            file = script
        if file is None and name not in sys.modules:
            file = getattr(importlib.util.find_spec(name), "origin", None)
        return None if file is None else Path(file).read_bytes()
    except (ImportError, ValueError, OSError):
        return None
