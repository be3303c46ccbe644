"""Inductor as a compiler of pieces, by ``standalone_compile`` or by ``compile_fx``."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule

from piecework.codegen.graph.origin import value_of
from piecework.errors import CaptureError, ConfigError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.compilers.interface import CompiledPiece, uncompiled
from piecework.runtime.compilers.passes import PostGradPassManager, pass_context
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.model import thaw
from piecework.runtime.counters import counters
from piecework.runtime.splitting_op import registry
from piecework.runtime.store.digest import digest_of, text_of
from piecework.runtime.store.surroundings import operator_facts, settings_factors
from piecework.runtime.trace.writes import written_inputs
from piecework.scope import set_for

# Stands beside the real names where partitions are wrapped, which Inductor's partitioning
# depends on and its cache key does not show; this name is in the key and matches no operator.
_WRAPPED = "piecework::partitions_are_wrapped"
# Whether an artifact's wrappers have work to do, which it no longer tells once it is loaded.
_DIRECT, _PUBLIC = b"direct\n", b"public\n"
Options = dict[str, object]
_log = logging.getLogger(__name__)


class InductorAdaptor:
    """Compiles through ``compile_fx``, in the capture's tracing context; nothing can be kept."""

    name = "inductor_compile_fx"
    calls_custom_ops_as_they_are = True

    def __init__(self, config: CompilationConfig | None = None) -> None:
        self._config = config = config or CompilationConfig()
        self.passes = PostGradPassManager.from_config(config)  # what runs on every piece
        # whether each partition becomes a `Partition`, which a captured model replays
        self.wraps = config.use_inductor_graph_partition
        self._always = thaw(config.inductor_compile_config) | self.passes.inductor_options(config)
        self._single_size = thaw(config.single_size_inductor_config)
        _require_options(config)

    def begin(self) -> None:
        begin_test()

    def compute_hash(self, config: CompilationConfig) -> str:
        options = {**thaw(config.inductor_compile_config), "single size": self._single_size}
        passes = [each.uuid() for each in self.passes.passes]
        found = digest_of([options, passes, _partition_ops(config)], "inductor_compile_config")
        text = f"{self.name} {torch.__version__} {torch_compat.inductor_key()} {found}"
        return hashlib.sha256(text.encode()).hexdigest()

    def options_for(self, compile_range: Range | None, graph: GraphModule | None = None) -> Options:
        """Inductor's options for one batch range, or for one piece."""
        # A piece holds no CUDA graphs of its own, whatever the environment says: it is captured.
        options = {"triton.cudagraphs": False, **self._always}
        if compile_range is not None and compile_range.is_single_size():
            options |= self._single_size
        if self.wraps:
            options["graph_partition"] = True
            options["custom_should_partition_ops"] = [*_partition_ops(self._config), _WRAPPED]
        if graph is not None and self._facts_for(graph) is None:
            # Inductor's own caches know operators by name alone: they would give another's code.
            options["force_disable_caches"] = True
        return options

    def _facts_for(self, graph: GraphModule) -> str | None:
        """What code for ``graph`` depends on besides it, example sizes too; None: unstable."""
        operators, reason = operator_facts(graph)
        try:
            settings = None if reason else settings_factors()
        except Unidentifiable:
            settings = None
        if settings is None:
            return None
        env = torch_compat.shape_env_of(value_of(node) for node in graph.graph.nodes)
        sizes = torch_compat.sizes_text(env), torch_compat.hints_text(env)
        return text_of([*sizes, operators, settings])

    def _partitions_wrapped(self) -> AbstractContextManager[None]:
        """While active, partitions of compiled and of loaded code are wrapped."""
        return torch_compat.partition_wrapper(wrap_partition) if self.wraps else nullcontext()

    def _realigned(self, compiled: Any) -> Any:
        if self.wraps:
            torch_compat.realign_inputs(compiled)
        return compiled

    def compile(
        self,
        graph: GraphModule,
        example_inputs: Sequence[object],
        config: CompilationConfig,
        compile_range: Range | None,
    ) -> CompiledPiece:
        if written_inputs(graph, shared=True):
            # AOTAutograd rebuilds such inputs from one base, whose size and start it takes from the
            # trace: where an input is a part of the memory, results are others.
            why = "it writes to memory that several of its inputs share"
            name = graph._get_name()
            _log.warning("%s is not compiled: %s, which compilers get wrong", name, why)
            counters.num_eager_compiles += 1
            return CompiledPiece(uncompiled(graph), indirect_because=why)
        _require_sizes(graph, example_inputs)
        await_test()
        counters.num_inductor_compiles += 1
        single = compile_range is not None and compile_range.is_single_size()
        facts, options = self._facts_for(graph) or "", self.options_for(compile_range, graph)
        with self._partitions_wrapped(), pass_context(compile_range, facts):
            made = self._realigned(self._made(graph, example_inputs, single, options))
        return self._piece(made, graph)

    def _made(
        self, graph: GraphModule, inputs: Sequence[object], single: bool, options: Options
    ) -> Callable[..., object]:
        return torch_compat.compile_fx(graph, inputs, own_shapes=single, options=options)

    def _piece(self, made: Callable[..., object], graph: GraphModule) -> CompiledPiece:
        return CompiledPiece(made, indirect_because="compile_fx gives no artifact")


class InductorStandaloneAdaptor(InductorAdaptor):
    """Compiles with ``torch._inductor.standalone_compile``: one artifact per piece."""

    name = "inductor"

    def _made(
        self, graph: GraphModule, inputs: Sequence[object], single: bool, options: Options
    ) -> Callable[..., object]:
        symbols = (torch_compat.symbol_of(n) for each in inputs for n in _sizes_of(each))
        if single and not any(symbol is not None for symbol in symbols):
            shapes = "from_example_inputs"
        else:
            traced = torch_compat.tracing_context() is not None
            shapes = "from_tracing_context" if traced else "from_graph"
        return torch_compat.standalone_compile(
            graph, inputs, dynamic_shapes=shapes, options=options
        )

    def _piece(
        self, made: Callable[..., object], graph: GraphModule, vouched: bool = False
    ) -> CompiledPiece:
        """The artifact, and its innermost function where nothing around it has anything to do."""
        inputs = len(graph.graph.find_nodes(op="placeholder"))
        returned = graph.graph.output_node().args[0]
        outputs = len(returned) if isinstance(returned, (list, tuple)) else -1
        call, reason = torch_compat.direct_entry(made, inputs, outputs, vouched=vouched)
        direct = None if call is None else positional(call, inputs)
        strict = torch_compat.strict_inputs(made, inputs)
        return CompiledPiece(made, made, direct, reason, strict)

    def to_bytes(self, piece: CompiledPiece) -> bytes | None:
        """The artifact with its kernels, for the cache; None if torch could not keep it."""
        data = torch_compat.artifact_to_bytes(piece.artifact)
        mark = _PUBLIC if piece.direct is None else _DIRECT
        return None if data is None else mark + data

    def from_bytes(self, data: bytes, graph: GraphModule) -> CompiledPiece:
        """What `to_bytes` kept of ``graph``; raises whatever torch raises for other bytes."""
        mark, rest = data[: len(_DIRECT)], data[len(_DIRECT) :]
        with self._partitions_wrapped():
            artifact = self._realigned(torch_compat.artifact_from_bytes(rest))
        return self._piece(artifact, graph, vouched=mark == _DIRECT)


def _partition_ops(config: CompilationConfig) -> list[str]:
    if not config.use_inductor_graph_partition:
        return []
    return list(registry.names() if config.splitting_ops is None else config.splitting_ops)


def _require_options(config: CompilationConfig) -> None:
    inside = config.use_inductor_graph_partition
    for field in ("inductor_compile_config", "single_size_inductor_config", "inductor_passes"):
        for name, value in getattr(config, field).items():
            cut = inside and (
                name in ("graph_partition", "custom_should_partition_ops")
                or (name == "cpp_wrapper" and value)
            )
            why = ""
            if not torch_compat.has_inductor_option(name):
                why = "Inductor has no such option; torch._inductor.list_options() lists them"
            elif cut or (name == "triton.cudagraphs" and value):
                why = "capture(...) and use_inductor_graph_partition decide about cuts and captures"
            if why:
                raise ConfigError(why, where=f"{field}.{name}", hint="leave the option out")


def _sizes_of(value: object) -> Sequence[object]:
    return value.shape if isinstance(value, torch.Tensor) else (value,)


def _require_sizes(graph: GraphModule, inputs: Sequence[object]) -> None:
    """Refuse a piece whose code would check a size that it is not given."""
    values = [*inputs, *map(value_of, graph.graph.nodes)]
    given = {symbol for value in inputs for symbol in torch_compat.free_sizes(value)}
    missing = sorted(map(str, torch_compat.asserted_symbols(values) - given))
    if missing:
        raise CaptureError(
            f"the trace asserts something of {missing[0]}, which the piece is not given, and a size "
            "that the data decides",
            where=graph._get_name(),
            hint="set dynamic_shapes_config.type to auto or backed, or pass the number as an int",
        )


def positional(call: Callable[..., object], inputs: int) -> Callable[..., object]:
    """``call``, which takes one list, as a function of parameters: half the cost of ``*args``."""
    names = ", ".join(f"a{i}" for i in range(inputs))
    scope: dict[str, Callable[..., object]] = {"call": call}
    exec(f"def piece({names}):\n    return call([{names}])", scope)
    return scope["piece"]


_TAKER: ContextVar[Any] = ContextVar("piecework_partition_taker", default=None)


class Partition:
    """One of ``count``. Models may share it, so the one that runs holds its graphs."""

    __slots__ = ("count", "function", "index")

    def __init__(self, function: Callable[..., object], index: int, count: int) -> None:
        self.function, self.index, self.count = function, index, count

    def __call__(self, args: list[object]) -> object:
        taker = _TAKER.get()
        if taker is None:
            return self.function(args)
        values = tuple(args)
        args.clear()
        return taker.run_partition(self, values)

    def run(self, *values: object) -> object:
        return self.function(list(values))


def wrap_partition(function: Callable[..., object], index: int, count: int) -> Partition:
    """The hook that Inductor calls with each partition of the code that it compiled or loaded."""
    return function if isinstance(function, Partition) else Partition(function, index, count)


def partitions_taken_by(taker: Any) -> AbstractContextManager[object]:
    """For the block, ``taker.run_partition(partition, values)`` runs what runs in this context."""
    return set_for(_TAKER, taker)


@cache
def _isa_test(process: int) -> Future[bool]:
    """The test of a process: in one that was forked meanwhile, another's thread does not go on."""
    with_one = ThreadPoolExecutor(1, "piecework-vector-isa")
    return with_one.submit(torch_compat.vector_isa_test())


def _isa_wanted() -> bool:
    """Not where Inductor knows, or pieces may be for a GPU."""
    return not (torch.cuda.is_available() or torch_compat.vector_isa_is_known())


def begin_test() -> None:
    """Test the CPU's strongest instructions beside a trace: all of them take Inductor seconds."""
    if _isa_wanted():
        _isa_test(os.getpid())


def await_test() -> None:
    """Have Inductor know them; where the test failed, it tests the others itself."""
    if _isa_wanted():
        found = _isa_test(os.getpid())
        if found.exception() is None and found.result():
            torch_compat.take_vector_isa()
