"""Inductor as a compiler of pieces, by ``standalone_compile`` or by ``compile_fx``."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.fx

from piecework.codegen.graph.origin import value_of
from piecework.errors import CaptureError, ConfigError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.compilers.eager import left_uncompiled
from piecework.runtime.compilers.interface import CompiledPiece
from piecework.runtime.compilers.partitions import wrap_partition
from piecework.runtime.compilers.vector_isa import await_test, begin_test
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.model import thaw
from piecework.runtime.counters import counters
from piecework.runtime.passes import PostGradPassManager, pass_context
from piecework.runtime.splitting_op import registry
from piecework.runtime.store.digest import digest_of, text_of
from piecework.runtime.store.surroundings import operator_facts, settings_factors
from piecework.runtime.trace.writes import written_inputs

#: Stands beside the real names where partitions are wrapped. Inductor's partitioning depends on whether a wrapper is set,
#: which its cache key does not show; this name is in the key and matches no operator.
_WRAPPED = "piecework::partitions_are_wrapped"
Options = dict[str, object]


class _Inductor(ABC):
    """What both ways into Inductor share.

    Args:
        config: the resolved configuration; its options and passes are settled here.

    Attributes:
        passes: the passes that run on every piece; their report says what matched.
        wraps: whether each partition becomes a `Partition`, which a captured model replays.

    Raises:
        ConfigError: Inductor has no option or pass slot of a name, a pass can't be imported, or
            options contradict the graph partition.
    """

    name = "inductor"
    calls_custom_ops_as_they_are = True

    def __init__(self, config: CompilationConfig | None = None) -> None:
        self._config = config = config or CompilationConfig()
        self.passes = PostGradPassManager.from_config(config)
        self.wraps = config.use_inductor_graph_partition
        self._always = thaw(config.inductor_compile_config) | self.passes.inductor_options(config)
        self._single_size = {k: thaw(v) for k, v in config.single_size_inductor_config.items()}
        _require_options(config)

    def begin(self) -> None:
        """A trace begins, whose pieces will be compiled."""
        begin_test()

    def compute_hash(self, config: CompilationConfig) -> str:
        options = {**config.inductor_compile_config, "single size": self._single_size}
        passes = [each.uuid() for each in self.passes.passes]
        found = digest_of([options, passes, _partition_ops(config)], "inductor_compile_config")
        text = f"{self.name} {torch.__version__} {torch_compat.inductor_key()} {found}"
        return hashlib.sha256(text.encode()).hexdigest()

    def options_for(
        self, compile_range: Range | None, graph: torch.fx.GraphModule | None = None
    ) -> Options:
        """Inductor's options for one batch range, complete; for one piece, where its graph is
        given.

        A single size gets those of ``single_size_inductor_config`` on top.
        """
        # A piece holds no CUDA graphs of its own, whatever the environment tells Inductor: it is captured as it is.
        options = {"triton.cudagraphs": False, **self._always}
        if compile_range is not None and compile_range.is_single_size():
            options |= self._single_size
        if self.wraps:
            options["graph_partition"] = True
            options["custom_should_partition_ops"] = [*_partition_ops(self._config), _WRAPPED]
        if graph is not None and self.facts_for(graph) is None:
            # Inductor's own caches know operators by name alone, and would give out another body's code.
            options["force_disable_caches"] = True
        return options

    def facts_for(self, graph: torch.fx.GraphModule) -> str | None:
        """What code for ``graph`` depends on besides the graph: what is known of its sizes, its
        operators, torch's settings.

        Inductor keeps code under it, so that its own caches tell apart what this one does. The
        example sizes count there: which guards a compilation adds depends on them. None where
        something has no stable form.
        """
        operators, reason = operator_facts(graph)
        if reason:
            return None
        try:
            settings = settings_factors()
        except Unidentifiable:
            return None
        env = torch_compat.shape_env_of(value_of(node) for node in graph.graph.nodes)
        sizes = torch_compat.sizes_text(env), torch_compat.hints_text(env)
        return text_of([*sizes, operators, settings])

    def partitions_wrapped(self) -> AbstractContextManager[None]:
        """While active, partitions of compiled and of loaded code are wrapped."""
        return torch_compat.partition_wrapper(wrap_partition) if self.wraps else nullcontext()

    def realign(self, compiled: Callable[..., object]) -> None:
        """Where partitions are wrapped, do what Inductor then leaves undone."""
        if self.wraps:
            torch_compat.realign_inputs(compiled)

    def compile(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[object],
        config: CompilationConfig,
        compile_range: Range | None,
    ) -> CompiledPiece:
        if written_inputs(graph, shared=True):
            return left_uncompiled(graph)
        _require_sizes(graph, example_inputs)
        await_test()
        counters.num_inductor_compiles += 1
        single = compile_range is not None and compile_range.is_single_size()
        with self.partitions_wrapped(), pass_context(compile_range, self.facts_for(graph) or ""):
            made = self._made(graph, example_inputs, single, self.options_for(compile_range, graph))
            self.realign(made)
        return self._piece(made, graph)

    @abstractmethod
    def _made(
        self, graph: torch.fx.GraphModule, inputs: Sequence[object], single: bool, options: Options
    ) -> Callable[..., object]:
        """What Inductor makes of ``graph``, for one batch size or for several."""

    @abstractmethod
    def _piece(self, made: Callable[..., object], graph: torch.fx.GraphModule) -> CompiledPiece:
        """What is called in place of ``graph``."""


def _partition_ops(config: CompilationConfig) -> list[str]:
    """Where Inductor cuts the code itself."""
    if not config.use_inductor_graph_partition:
        return []
    return list(registry.names() if config.splitting_ops is None else config.splitting_ops)


def _require_options(config: CompilationConfig) -> None:
    for field in ("inductor_compile_config", "single_size_inductor_config", "inductor_passes"):
        unknown = [n for n in getattr(config, field) if not torch_compat.has_inductor_option(n)]
        if unknown:
            raise ConfigError(
                f"this torch's Inductor has no option {', '.join(map(repr, unknown))}",
                where=f"{field}.{unknown[0]}",
                hint="torch._inductor.list_options() lists them",
            )
    given = {**config.inductor_compile_config, **config.single_size_inductor_config}
    cuts = config.use_inductor_graph_partition
    for name, clashes in (
        ("triton.cudagraphs", given.get("triton.cudagraphs")),
        ("graph_partition", cuts and "graph_partition" in given),
        ("custom_should_partition_ops", cuts and "custom_should_partition_ops" in given),
        ("cpp_wrapper", cuts and given.get("cpp_wrapper")),
    ):
        if clashes:
            raise ConfigError(
                "a piece can't hold CUDA graphs of Inductor's: capture makes them; and use_inductor_graph_partition sets "
                "how code is cut, without a C++ wrapper",
                where=f"inductor_compile_config.{name}",
                hint="leave the option out",
            )


class InductorStandaloneAdaptor(_Inductor):
    """Compiles with ``torch._inductor.standalone_compile``: one artifact per piece."""

    def _made(
        self, graph: torch.fx.GraphModule, inputs: Sequence[object], single: bool, options: Options
    ) -> Callable[..., object]:
        if single and not _has_symbols(inputs):
            shapes = "from_example_inputs"
        elif torch_compat.tracing_context() is not None:
            shapes = "from_tracing_context"
        else:
            shapes = "from_graph"
        return torch_compat.standalone_compile(
            graph, inputs, dynamic_shapes=shapes, config_patches=options
        )

    def _piece(
        self, made: Callable[..., object], graph: torch.fx.GraphModule, vouched: bool = False
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

    def from_bytes(self, data: bytes, graph: torch.fx.GraphModule) -> CompiledPiece:
        """What `to_bytes` kept of ``graph``; raises whatever torch raises for other bytes."""
        mark, rest = data[: len(_DIRECT)], data[len(_DIRECT) :]
        with self.partitions_wrapped():
            artifact = torch_compat.artifact_from_bytes(rest)
            self.realign(artifact)
        return self._piece(artifact, graph, vouched=mark == _DIRECT)


# A loaded artifact no longer has the record that says whether its wrappers have work to do; the mark keeps the finding.
_DIRECT, _PUBLIC = b"direct\n", b"public\n"


class InductorAdaptor(_Inductor):
    """Compiles through ``torch._inductor.compile_fx``, as the other one does; nothing can be kept.

    It needs the tracing context of the capture, as a Dynamo backend has it.
    """

    name = "inductor_compile_fx"

    def _made(
        self, graph: torch.fx.GraphModule, inputs: Sequence[object], single: bool, options: Options
    ) -> Callable[..., object]:
        return torch_compat.compile_fx(graph, inputs, own_shapes=single, config_patches=options)

    def _piece(self, made: Callable[..., object], graph: torch.fx.GraphModule) -> CompiledPiece:
        return CompiledPiece(made, indirect_because="compile_fx gives no artifact")


def _require_sizes(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> None:
    """Refuse a piece whose code would check a size that it is not given.

    Raises:
        CaptureError: the trace asserted something of a value that is no argument and no size of
            one.
    """
    values = [*inputs, *map(value_of, graph.graph.nodes)]
    given = {symbol for value in inputs for symbol in torch_compat.free_sizes(value)}
    missing = sorted(map(str, torch_compat.asserted_symbols(values) - given))
    if missing:
        raise CaptureError(
            f"the trace asserts something of {missing[0]} and a size that the data decides, and the piece is given only the latter",
            where=graph._get_name(),
            hint="set dynamic_shapes_config.type to auto or backed, or pass the number as an int",
        )


def positional(call: Callable[..., object], inputs: int) -> Callable[..., object]:
    """``call``, which takes one list, as a function of ``inputs`` parameters.

    Written out for the number of parameters, which is half the cost of ``*args``.
    """
    names = ", ".join(f"a{i}" for i in range(inputs))
    scope: dict[str, Callable[..., object]] = {"call": call}
    exec(f"def piece({names}):\n    return call([{names}])", scope)
    return scope["piece"]


def _has_symbols(values: Sequence[object]) -> bool:
    """Whether a size is still symbolic."""
    return any(
        torch_compat.symbol_of(size) is not None
        for value in values
        for size in (value.shape if isinstance(value, torch.Tensor) else (value,))
    )
