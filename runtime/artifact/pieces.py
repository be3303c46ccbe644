"""Compiled pieces as text, kernels and constants, and a callable again.

Text is Inductor's own, less what it needs to compile; every name in it is on an allow-list.
"""

import builtins
import inspect
import pkgutil
import re
import textwrap
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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

_AGAIN = "compile the model again, and save it then"
_KERNEL = re.compile(r'= kernel\("(\w+)"\)')
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


class PieceForm(NamedTuple):
    """A compiled form of a piece, as an artifact names it."""

    name: str  # the file of its text
    inputs: int
    strict: frozenset[int]  # `CompiledPiece.strict_inputs`
    inductor: bool  # whether the text is Inductor's, or the piece's operators one by one


class Loaded(NamedTuple):
    """What a loaded piece was made of, so that it can be saved again."""

    form: PieceForm
    files: Mapping[str, bytes]


def piece_files(graph: torch.fx.GraphModule, compiled: CompiledPiece, name: str) -> Loaded:
    """What is kept of a piece; `ArtifactError` where its code does not travel."""
    if isinstance(compiled.artifact, Loaded):
        return compiled.artifact
    inductor = compiled.artifact is not None
    code, files = _generated(graph, compiled, name) if inductor else _uncompiled(graph, name)
    digest = sha256(code.encode() + repr(sorted(files.items())).encode())[:16]
    text = f"pieces/{digest}.py"
    named = {key.replace("{piece}", digest): data for key, data in files.items()}
    inputs = len(graph.graph.find_nodes(op="placeholder"))
    form = PieceForm(text, inputs, compiled.strict_inputs, inductor)
    return Loaded(form, {text: code.encode(), **named})


def _refused(
    name: str,
    why: str,
    hint: str = "CompilationConfig(backend='eager') is saved without compiled code",
) -> ArtifactError:
    return ArtifactError(f"{name} can't be saved: {why}", where=name, hint=hint)


def _generated(
    graph: torch.fx.GraphModule, compiled: CompiledPiece, name: str
) -> tuple[str, dict[str, bytes]]:
    """The function that Inductor generated, under lines that make the names that it reads."""
    if compiled.direct is None:
        raise _refused(name, f"its code needs torch's wrappers, {compiled.indirect_because}")
    inputs = len(graph.graph.find_nodes(op="placeholder"))
    outputs: Any = graph.graph.output_node().args[0]
    found = torch_compat.generated_code(compiled.artifact, inputs, len(outputs))
    if isinstance(found, str):
        raise _refused(name, found)
    function, values, text = found.function, found.function.__globals__, _function_text(found, name)
    lines, files = ["import math", "import types", "", "import torch", ""], {}
    for each in sorted(set().union(*map(global_names, with_inner_code([function.__code__])))):
        value, known = values.get(each, getattr(builtins, each, None)), _KNOWN.get(each)
        kernel = torch_compat.kernel_file(value)
        if kernel is not None:
            try:
                data = kernel.read_bytes()
            except OSError as error:
                raise _refused(name, f"a kernel of it is gone: {error}", _AGAIN) from error
            digest = sha256(data)[:32]
            files[_kernel_file(digest)] = data
            lines.append(f'{each} = kernel("{digest}")')
        elif each == "extern_kernels":
            lines.append(f"extern_kernels = types.SimpleNamespace({_externals(text, value, name)})")
        elif known and (each in ("inf", "nan") or value is pkgutil.resolve_name(known)):
            lines += [f"{each} = {known}"] if known != each else []
        elif each in values or not hasattr(builtins, each):
            raise _refused(name, f"its code uses {each}, which does not travel")
    head = "# Inductor's code of a piece, as it runs; its kernels lie in ../kernels.\n\n"
    return f"{head}{chr(10).join(lines)}\n\n\n{text}", files


def _function_text(found: torch_compat.Generated, name: str) -> str:
    """The text of the function that runs; `ArtifactError` where the text is of another one."""
    code = found.function.__code__
    try:
        written = with_inner_code([compile(found.text, name, "exec", dont_inherit=True)])
        lines = found.text.splitlines(keepends=True)[code.co_firstlineno - 1 :]
        if code in written:  # equal but for the file's name
            return textwrap.dedent("".join(inspect.getblock(lines)))
    except SyntaxError:
        pass
    raise _refused(name, "what runs is not what Inductor's text says", _AGAIN)


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


def _uncompiled(graph: torch.fx.GraphModule, name: str) -> tuple[str, dict[str, bytes]]:
    try:
        source = generate_source(graph)
    except PieceworkError as error:
        raise _refused(name, error.message, error.hint or "compile it with Inductor") from error
    if source.submod_names:
        raise _refused(name, "it calls modules of its own", "compile it with Inductor")
    return source.code, {"pieces/{piece}.consts": to_bytes(source.consts, name)}


@dataclass(slots=True)
class PieceLoader:
    """Makes callables of an artifact's pieces, each once."""

    read: Callable[[str], bytes]  # gives a file's verified bytes
    _made: dict[str, CompiledPiece] = field(default_factory=dict)

    def piece(self, form: PieceForm) -> CompiledPiece:
        """The piece of a form."""
        if form.name not in self._made:
            code = self.read(form.name).decode()
            if form.inductor:
                made = self._inductor(form, code)
                others = list(map(_kernel_file, _KERNEL.findall(code)))
            else:
                others = [f"{form.name.removesuffix('.py')}.consts"]
                consts = from_bytes(self.read(others[0]), form.name)
                function = compile_execution_fn(code, {}, (), consts)  # type: ignore[arg-type]
                made = CompiledPiece(function, strict_inputs=form.strict)
            files = {name: self.read(name) for name in (form.name, *others)}
            self._made[form.name] = replace(made, artifact=Loaded(form, files))
        return self._made[form.name]

    def _inductor(self, form: PieceForm, code: str) -> CompiledPiece:
        try:
            function = execute_source(code, {"kernel": self._kernel}, "call")
        except PieceworkError as error:
            hint = "the system needs the libraries that a kernel was linked with, such as libgomp; or save the model again"
            why = f"a piece can't be loaded: {error.message}"
            raise ArtifactError(why, where=form.name, hint=hint) from error
        takes_self = function.__code__.co_varnames[:1] == ("self",)
        call = types.MethodType(function, self) if takes_self else function
        direct = positional(call, form.inputs)
        return CompiledPiece(_without_autocast(direct), None, direct, "", form.strict)

    def _kernel(self, digest: str) -> Callable[..., object]:
        return torch_compat.load_kernel(self.read(_kernel_file(digest)), digest)


def _kernel_file(digest: str) -> str:
    return f"kernels/{digest}.so"


def _without_autocast(function: Callable[..., object]) -> Callable[..., object]:
    """``function`` as torch's wrappers call it: what it calls was traced."""

    def run(*args: object) -> object:
        with torch_compat.autocast_off():
            return function(*args)

    return run
