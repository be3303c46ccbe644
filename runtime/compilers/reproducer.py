"""A piece that failed to compile, as a file to run. In: the piece's graph and fake inputs. Out: a Python file that compiles it again.

It holds no weights and no data: inputs are made anew from their sizes, strides and dtypes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import indent

import torch
import torch.fx

from piecework.codegen.graph.origin import value_of
from piecework.codegen.split.splitting import operator_name
from piecework.errors import PieceworkError
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range, file_name
from piecework.runtime.compilers.interface import CompilerInterface
from piecework.runtime.config.compilation import CompilationConfig


def keep_reproducer(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    config: CompilationConfig,
    compile_range: Range | None,
    *,
    submod_name: str,
    error: BaseException,
) -> Path:
    """Write the reproducer of a failure, whole or not at all.

    Args:
        graph: the piece.
        example_inputs: what the compiler was given.
        config: the resolved configuration; its ``debug_dump_path`` is where the file goes, else a temporary folder.
        compile_range: the batch sizes that were compiled.
        submod_name: the piece's name, which becomes the file's.
        error: what the compiler raised.

    Returns:
        The file.

    Raises:
        OSError: it can't be written.
    """
    text = reproducer_source(
        graph, example_inputs, config, compile_range, submod_name=submod_name, error=error
    )
    if config.debug_dump_path is None:
        folder = Path(tempfile.mkdtemp(prefix="piecework-failed-"))
    else:
        folder = Path(config.debug_dump_path) / "failed"
        folder.mkdir(parents=True, exist_ok=True)
    return _write_beside(folder, file_name(submod_name, compile_range), text)


def _write_beside(folder: Path, stem: str, text: str) -> Path:
    """Write ``text``, whole or not at all, to ``stem.py``, or to ``stem-2.py`` and so on where another text lies there."""
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        for number in itertools.count(1):
            target = folder / (f"{stem}.py" if number == 1 else f"{stem}-{number}.py")
            if not target.exists():
                with contextlib.suppress(FileExistsError):  # another process was faster
                    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                    os.replace(temporary, target)
                    return target
            elif target.is_file() and target.read_text(encoding="utf-8") == text:
                return target  # the same failure, kept before
    finally:
        Path(temporary).unlink(missing_ok=True)
    raise AssertionError("there is always a next number")


# --- the text ----------------------------------------------------------------------------------------


def reproducer_source(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    config: CompilationConfig,
    compile_range: Range | None,
    *,
    submod_name: str,
    error: BaseException,
) -> str:
    """The file as text; arguments as `keep_reproducer`."""
    imports: dict[str, None] = {}
    classes: list[str] = []
    _write_module("Piece", graph, classes, imports)
    sizes: dict[str, int] = {}
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    rows = [
        f"    ({name!r}, {_describe(value, sizes)}),"
        for name, value in zip(names, example_inputs, strict=True)
    ]
    operators = sorted(_operators(graph))
    summary = _one_line(f"{type(error).__name__}: {error}")
    limits = (
        "None" if compile_range is None else f"Range({compile_range.start}, {compile_range.end})"
    )
    return "\n".join(
        [
            f'"""{submod_name}, which {config.backend} could not compile. Run it to compile it again.',
            "",
            f"torch {torch.__version__}",
            *([f"Operators to register first: {', '.join(operators)}"] if operators else []),
            '"""',
            "",
            f"# {summary}",
            "",
            "import torch",
            *imports,
            "",
            "from piecework.runtime.compilers.reproducer import compile_again",
            "from piecework.runtime.config.text import from_json",
            "from piecework.runtime.config.compilation import CompilationConfig",
            "from piecework.runtime.batch.ranges import Range",
            "",
            *classes,
            "# What the trace took for the symbols.",
            f"SIZES = {sizes!r}",
            "",
            "# (name, size) or (name, dtype, device, sizes, strides), one per input, in terms of SIZES",
            "INPUTS = [",
            *rows,
            "]",
            *_config_lines(config),
            f"COMPILE_RANGE = {limits}",
            "",
            'if __name__ == "__main__":',
            "    config = from_json(CompilationConfig, CONFIG)",
            "    compile_again(Piece(), INPUTS, SIZES, config, COMPILE_RANGE)",
            '    print("compiled and ran")',
            "",
        ]
    )


def _one_line(text: str) -> str:
    """``text`` for a comment: one line of printable ASCII."""
    return ascii(text.strip().partition("\n")[0])[1:-1][:160]


def _config_lines(config: CompilationConfig) -> list[str]:
    """What the compiler reads of the configuration, as JSON text; what no file can hold is left out, and said so."""
    from piecework.runtime.config.text import to_data

    fields = ("inductor_compile_config", "single_size_inductor_config", "inductor_passes")
    kept: dict[str, object] = {"backend": config.backend}
    left_out: list[str] = []
    for name in (*fields, "pass_config", "use_inductor_graph_partition", "splitting_ops"):
        value = getattr(config, name)
        try:
            kept[name] = to_data(CompilationConfig(**{name: value}))[name]  # type: ignore[arg-type]
        except PieceworkError as error:
            left_out.append(f"# left out: {_one_line(str(error))}")
    return [*left_out, f"CONFIG = {json.dumps(kept)!r}"]


def _write_module(
    name: str, module: torch.fx.GraphModule, classes: list[str], imports: dict[str, None]
) -> None:
    """Append the class of ``module`` to ``classes``, those of its submodules before it."""
    setup: list[str] = []
    for node in module.graph.nodes:
        if node.op not in ("get_attr", "call_module") or "." in str(node.target):
            continue
        attribute = str(node.target)
        value = getattr(module, attribute)
        line = ""
        if isinstance(value, torch.fx.GraphModule):
            _write_module(f"{name}_{attribute}", value, classes, imports)
            line = f"self.{attribute} = {name}_{attribute}()"
        elif isinstance(value, torch.Tensor):
            made = f"torch.zeros({tuple(value.shape)!r}, dtype={value.dtype}, device={str(value.device)!r})"
            line = f'self.register_buffer("{attribute}", {made})'
        if line and line not in setup:
            setup.append(line)
    code = module.graph.python_code("self")
    imports.update(
        dict.fromkeys(filter(None, map(_import_line, *zip(*code.globals.items(), strict=True))))
    )
    body = ["def __init__(self):", "    super().__init__()", *(f"    {line}" for line in setup)]
    source = "\n".join([*body, "", code.src.strip("\n").rstrip()])
    classes.append(f"class {name}(torch.nn.Module):\n{indent(source, '    ')}\n\n")


def _import_line(name: str, value: object) -> str:
    """What makes the global ``name`` of generated code; "" for names that need nothing."""
    if name == "torch":
        return ""
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__} as {name}"
    if isinstance(value, float):
        return (
            f"{name} = float({str(value)!r})" if not math.isfinite(value) else f"{name} = {value!r}"
        )
    if value is type(None):
        return f"{name} = type(None)"
    module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module and path and "<" not in path:
        head, _, rest = path.partition(".")
        tail = f"\n{name} = {path}" if rest else ""
        return f"from {module} import {head}{'' if rest else f' as {name}'}{tail}"
    return f"# {name} is {type(value).__qualname__}, which has no importable name"


def _describe(value: object, sizes: dict[str, int]) -> str:
    """One input as a literal; adds the hints of its symbols to ``sizes``."""
    if isinstance(value, torch.Tensor):
        shape = [_size_text(each, sizes) for each in value.shape]
        strides = [_size_text(each, sizes) for each in value.stride()]
        return f"{str(value.dtype)!r}, {str(value.device)!r}, {shape!r}, {strides!r}"
    return repr(_size_text(value, sizes))


def _size_text(value: object, sizes: dict[str, int]) -> str:
    for symbol, hint in torch_compat.symbol_hints(value).items():
        sizes.setdefault(symbol, hint)
    return str(torch_compat.symbol_of(value) or value)


def _operators(graph: torch.fx.GraphModule) -> set[str]:
    """Operators in the piece that torch does not bring itself."""
    called = {operator_name(node.target) for node in graph.graph.nodes}
    own = ("aten", "prims", "prim", "inductor")
    return {name for name in called if name and name.partition("::")[0] not in own}


# --- running it --------------------------------------------------------------------------------------


def compile_again(
    piece: torch.nn.Module,
    inputs: Sequence[tuple[object, ...]],
    sizes: Mapping[str, int],
    config: CompilationConfig,
    compile_range: Range | None,
    compiler: CompilerInterface | None = None,
) -> object:
    """Compile ``piece`` as a piece and run it once on random inputs; what a reproducer calls.

    Args:
        piece: the piece as a module.
        inputs: ``(name, size)`` or ``(name, dtype, device, sizes, strides)``, expressions in terms of ``sizes``.
        sizes: symbol → size.
        config: names the compiler and its options.
        compile_range: the batch sizes to compile for.
        compiler: what compiles it; that of ``config`` by default.

    Returns:
        What the compiled piece returns.

    Raises:
        Exception: whatever the compiler raises.
    """
    from piecework.runtime.compilers import make_compiler

    chosen = compiler or make_compiler(config)
    fixed = compile_range is not None and compile_range.is_single_size()

    def backend(graph: torch.fx.GraphModule, _: Sequence[object]) -> Callable[..., object]:
        fakes = [value_of(node) for node in graph.graph.find_nodes(op="placeholder")]
        output = graph.graph.output_node()
        output.args = (tuple(output.args[0]),)  # type: ignore[arg-type]
        graph.recompile()
        return chosen.compile(graph, fakes, config, compile_range).runnable

    values = [_make_input(row[1:], sizes) for row in inputs]
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        compiled = torch.compile(piece, backend=backend, fullgraph=True, dynamic=not fixed)
        return compiled(*values)


def _make_input(row: Sequence[object], sizes: Mapping[str, int]) -> object:
    def size(text: object) -> int:
        # An expression that this module wrote: symbols, numbers, arithmetic.
        return int(eval(str(text), {"__builtins__": {}}, {**_ARITHMETIC, **sizes}))

    if len(row) == 1:
        return size(row[0])
    dtype_name, device, shape, strides = row
    dtype = getattr(torch, str(dtype_name).removeprefix("torch."))
    assert isinstance(shape, list) and isinstance(strides, list)
    made = torch.empty_strided(
        [size(n) for n in shape], [size(n) for n in strides], dtype=dtype, device=str(device)
    )
    if dtype.is_floating_point:
        return made.copy_(torch.rand(made.shape))
    return made.zero_()


_ARITHMETIC: dict[str, object] = {
    "Max": max,
    "Min": min,
    "FloorDiv": lambda a, b: a // b,
    "CeilDiv": lambda a, b: -(-a // b),
    "Mod": lambda a, b: a % b,
    "PythonMod": lambda a, b: a % b,
    "ModularIndexing": lambda a, b, c: a // b % c,
}
