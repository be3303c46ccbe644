"""Compiled pieces as text and shared objects: the Python that runs, its kernels and its constants,
and a callable again.

Text is Inductor's own, less what it needs to compile; every name in it is on an allow-list. Loading
compiles nothing.
"""

from __future__ import annotations

import ast
import builtins
import math
import re
import textwrap
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx

from piecework.code_objects import global_names, with_inner_code
from piecework.codegen.graph.targets import function_path
from piecework.codegen.stitch.bind import compile_execution_fn, execute_source
from piecework.codegen.stitch.source import generate_source
from piecework.errors import ArtifactError, PieceworkError
from piecework.runtime import torch_compat
from piecework.runtime.artifact.values import from_bytes, to_bytes
from piecework.runtime.compilers.inductor import positional
from piecework.runtime.compilers.interface import CompiledPiece
from piecework.runtime.store.files import sha256

KERNELS = "kernels"
_FUNCTION = "call"
#: Names of generated modules that mean the same everywhere, and what they are.
_KNOWN = {
    "aten": "torch.ops.aten",
    "inductor_ops": "torch.ops.inductor",
    "_quantized": "torch.ops._quantized",
    "assert_size_stride": "torch._C._dynamo.guards.assert_size_stride",
    "assert_size_stride_grouped": "torch._C._dynamo.guards.assert_size_stride_grouped",
    "assert_alignment": "torch._C._dynamo.guards.assert_alignment",
    "empty_strided_cpu": "torch._C._dynamo.guards._empty_strided_cpu",
    "reinterpret_tensor": "torch._C._dynamo.guards._reinterpret_tensor",
    "alloc_from_pool": "torch.ops.inductor._alloc_from_pool",
    "device": "torch.device",
    "empty_strided": "torch.empty_strided",
    "inf": "math.inf",
    "nan": "math.nan",
    "math": "math",
    "torch": "torch",
}


@dataclass(frozen=True, slots=True)
class PieceFiles:
    """A compiled form of a piece.

    Attributes:
        name: its text's name, by content.
        files: name → bytes.
        strict: see `CompiledPiece.strict_inputs`.
        inductor: the text is Inductor's; else it is the piece's operators, one by one.
    """

    name: str
    files: Mapping[str, bytes]
    strict: frozenset[int]
    inductor: bool


def piece_files(graph: torch.fx.GraphModule, compiled: CompiledPiece, name: str) -> PieceFiles:
    """What is kept of a piece.

    Args:
        name: what errors call it.

    Raises:
        ArtifactError: its code needs something that does not travel.
    """
    if isinstance(compiled.artifact, PieceFiles):  # loaded, and saved again
        return compiled.artifact
    if compiled.artifact is None:
        code, files = _uncompiled(graph, name)
    else:
        code, files = _generated(graph, compiled, name)
    digest = sha256(code.encode() + repr(sorted(files)).encode())[:16]
    text = f"pieces/{digest}.py"
    named = {key.replace("{piece}", digest): data for key, data in files.items()}
    found = {text: code.encode(), **named}
    return PieceFiles(text, found, compiled.strict_inputs, compiled.artifact is not None)


def _refused(
    name: str,
    why: str,
    hint: str = "CompilationConfig(backend='eager') is saved without compiled code",
) -> ArtifactError:
    return ArtifactError(f"{name} can't be saved: {why}", where=name, hint=hint)


# --- what Inductor generated -------------------------------------------------------------------------


def _generated(
    graph: torch.fx.GraphModule, compiled: CompiledPiece, name: str
) -> tuple[str, dict[str, bytes]]:
    inputs = len(graph.graph.find_nodes(op="placeholder"))
    returned = graph.graph.output_node().args[0]
    outputs = len(returned) if isinstance(returned, (list, tuple)) else -1
    if compiled.direct is None:
        raise _refused(name, f"its code needs torch's wrappers, {compiled.indirect_because}")
    found = torch_compat.generated_code(compiled.artifact, inputs, outputs)
    if isinstance(found, str):
        raise _refused(name, found)
    text = _function_text(found)
    if text is None:
        raise _refused(name, "the text of its code is not what runs")
    lines, files = ["import math", "import types", "", "import torch", ""], {}
    code = with_inner_code([found.function.__code__])
    for each in sorted(set().union(*map(global_names, code))):
        value = found.values.get(each, getattr(builtins, each, None))
        kernel = torch_compat.kernel_file(value)
        if kernel is not None:
            try:
                data = kernel.read_bytes()
            except OSError as error:
                why = f"its kernel is gone ({error.strerror})"
                raise _refused(name, why, "compile the model again") from error
            digest = sha256(data)[:32]
            files[f"{KERNELS}/{digest}.so"] = data
            lines.append(f'{each} = kernel("{digest}")')
        elif each == "extern_kernels":
            lines.append(f"extern_kernels = types.SimpleNamespace({_externals(text, value, name)})")
        elif each in _KNOWN:
            if value is not _value_of(_KNOWN[each]) and each not in ("inf", "nan"):
                raise _refused(name, f"its code has another {each} than torch's")
            if _KNOWN[each] != each:
                lines.append(f"{each} = {_KNOWN[each]}")
        elif each not in found.values and hasattr(builtins, each):
            continue
        else:
            raise _refused(name, f"its code uses {each}, which does not travel")
    head = "# Inductor's code of a piece, as it runs; its kernels lie in ../kernels.\n\n"
    return f"{head}{chr(10).join(lines)}\n\n\n{text}", files


def _function_text(found: torch_compat.Generated) -> str | None:
    """The text of the function that runs; None unless it compiles to that very code there."""
    ours = found.function.__code__
    module = compile(found.text, "<piece>", "exec", dont_inherit=True)
    inner = with_inner_code([module])
    if not any(_content(each) == _content(ours) for each in inner):
        return None
    for node in ast.walk(ast.parse(found.text)):
        if isinstance(node, ast.FunctionDef) and node.lineno == ours.co_firstlineno:
            lines = found.text.splitlines()[node.lineno - 1 : node.end_lineno]
            return textwrap.dedent("\n".join(lines)) + "\n"
    return None


def _content(code: types.CodeType) -> tuple[object, ...]:
    names = code.co_name, code.co_names, code.co_varnames, code.co_firstlineno
    consts = [_content(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return *names, code.co_code, repr(consts)


def _externals(text: str, owner: object, name: str) -> str:
    """The kernels of ATen's that the code calls, by their public names."""
    parts = []
    for each in sorted(set(re.findall(r"\bextern_kernels\.(\w+)", text))):
        path = function_path(getattr(owner, each, None))
        if path is None or path.root != "torch":
            why = f"its code calls extern_kernels.{each}, which is Python of Inductor's"
            raise _refused(name, why, "switch max_autotune off")
        parts.append(f"{each}={path.path}")
    return ", ".join(parts)


def _value_of(path: str) -> object:
    value: Any = {"torch": torch, "math": math}[path.partition(".")[0]]
    for part in path.split(".")[1:]:
        value = getattr(value, part, None)
    return value


def _uncompiled(graph: torch.fx.GraphModule, name: str) -> tuple[str, dict[str, bytes]]:
    try:
        source = generate_source(graph)
    except PieceworkError as error:
        raise _refused(name, error.message, error.hint or "compile it with Inductor") from error
    if source.submod_names:
        raise _refused(name, "it calls modules of its own", "compile it with Inductor")
    return source.code, {"pieces/{piece}.consts": to_bytes(source.consts, name)}


# --- loading -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class PieceLoader:
    """Makes callables of an artifact's pieces, each once.

    Args:
        read: the verified bytes of a file.
    """

    read: Callable[[str], bytes]
    _made: dict[str, CompiledPiece] = field(default_factory=dict)

    def piece(
        self, name: str, inputs: int, strict: frozenset[int], inductor: bool
    ) -> CompiledPiece:
        """The piece whose text is called ``name``."""
        if name not in self._made:
            held: dict[str, bytes] = {}

            def read(file: str) -> bytes:
                held[file] = self.read(file)
                return held[file]

            code = read(name).decode()
            if inductor:
                found = self._inductor(name, code, inputs, strict, read)
            else:
                consts = from_bytes(read(f"{name.removesuffix('.py')}.consts"), name)
                assert isinstance(consts, tuple)
                function = compile_execution_fn(code, {}, (), consts)
                found = CompiledPiece(function, strict_inputs=strict)
            self._made[name] = replace(found, artifact=PieceFiles(name, held, strict, inductor))
        return self._made[name]

    def _inductor(
        self,
        name: str,
        code: str,
        inputs: int,
        strict: frozenset[int],
        read: Callable[[str], bytes],
    ) -> CompiledPiece:
        def kernel(digest: str) -> Callable[..., object]:
            file = f"{KERNELS}/{digest}.so"
            try:
                return torch_compat.load_kernel(read(file), digest)
            except (ImportError, OSError, AttributeError) as error:
                raise ArtifactError(
                    f"a kernel can't be loaded: {error}",
                    where=file,
                    hint="the system needs the libraries that it was linked with, such as libgomp; or compile here",
                ) from error

        try:
            function = execute_source(code, {"kernel": kernel}, _FUNCTION)
        except PieceworkError as error:
            raise ArtifactError(
                f"a piece can't be loaded: {error.message}", where=name, hint="save the model again"
            ) from error
        takes_self = function.__code__.co_varnames[:1] == ("self",)
        call = types.MethodType(function, self) if takes_self else function
        direct = positional(call, inputs)
        return CompiledPiece(_without_autocast(direct), None, direct, "", strict)


def _without_autocast(function: Callable[..., object]) -> Callable[..., object]:
    """``function`` as torch's wrappers call it: what it calls was traced."""

    def run(*args: object) -> object:
        with torch_compat.autocast_off():
            return function(*args)

    return run
