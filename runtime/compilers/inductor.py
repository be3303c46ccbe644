"""Inductor as a compiler of pieces, by ``standalone_compile`` or by ``compile_fx``."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.fx

from piecework.codegen.graph.origin import value_of
from piecework.errors import CaptureError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.analysis.writes import written_aliases
from piecework.runtime.batch.ranges import Range
from piecework.runtime.compilers.eager import left_uncompiled
from piecework.runtime.compilers.inductor_options import InductorOptions
from piecework.runtime.compilers.interface import CompiledPiece
from piecework.runtime.compilers.partitions import wrap_partition
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.passes import PostGradPassManager, pass_context
from piecework.runtime.store.digest import digest_of, text_of
from piecework.runtime.store.surroundings import operator_facts, settings_factors

_log = logging.getLogger(__name__)


class _Inductor:
    """What both ways into Inductor share.

    Args:
        config: the resolved configuration; its options and passes are settled here.

    Attributes:
        options: Inductor's options per batch range.
        wrap_partition: turns each partition (function, index, count) into what is called in its place. With
            ``use_inductor_graph_partition`` that is a `Partition`, which a captured model replays; None leaves partitions
            as they are.

    Raises:
        ConfigError: as `InductorOptions`.
    """

    name = "inductor"
    calls_custom_ops_as_they_are = True

    def __init__(self, config: CompilationConfig | None = None) -> None:
        self.options = InductorOptions(config or CompilationConfig())
        self.wrap_partition: PartitionWrapper | None = None
        if self.options.config.use_inductor_graph_partition:
            self.wrap_partition = wrap_partition

    @property
    def passes(self) -> PostGradPassManager:
        """The passes that run on every piece; their report says what matched."""
        return self.options.passes

    def compute_hash(self, config: CompilationConfig) -> str:
        options = digest_of(InductorOptions(config).identity(), "inductor_compile_config")
        wrapped = self.wrap_partition is not None
        text = f"{self.name} {torch.__version__} {torch_compat.inductor_key()} {options} {wrapped}"
        return hashlib.sha256(text.encode()).hexdigest()

    def options_for(
        self, compile_range: Range | None, graph: torch.fx.GraphModule | None = None
    ) -> dict[str, object]:
        """Inductor's options for one batch range, complete; for one piece, where its graph is given."""
        wraps = self.wrap_partition is not None
        options = self.options.for_range(compile_range, wraps_partitions=wraps)
        if graph is not None and self.facts_for(graph) is None:
            # Inductor's own caches know operators by name alone, and would give out another body's code.
            options["force_disable_caches"] = True
        return options

    def facts_for(self, graph: torch.fx.GraphModule) -> str | None:
        """What code for ``graph`` depends on besides the graph: what is known of its sizes, its operators, torch's settings.

        Inductor keeps code under it, so that its own caches tell apart what this one does. The example sizes count there: which
        guards a compilation adds depends on them. None where something has no stable form.
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
        """While active, partitions of compiled and of loaded code are wrapped; what was set before comes back."""
        if self.wrap_partition is None:
            return nullcontext()
        return torch_compat.partition_wrapper(self.wrap_partition)

    def realign(self, compiled: Callable[..., object]) -> None:
        """Where partitions are wrapped, do what Inductor then leaves undone: inputs at odd addresses are copied."""
        if self.wrap_partition is not None:
            torch_compat.realign_inputs(compiled)


PartitionWrapper = Callable[[Callable[..., object], int, int], Callable[..., object]]


class InductorStandaloneAdaptor(_Inductor):
    """Compiles with ``torch._inductor.standalone_compile``: one artifact per piece, independent of Dynamo."""

    def compile(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[object],
        config: CompilationConfig,
        compile_range: Range | None,
    ) -> CompiledPiece:
        if written_aliases(graph):
            return left_uncompiled(graph)
        _require_sizes(graph, example_inputs)
        counters.num_inductor_compiles += 1
        single = compile_range is not None and compile_range.is_single_size()
        if single and not _has_symbols(example_inputs):
            shapes = "from_example_inputs"
        elif torch_compat.tracing_context() is not None:
            shapes = "from_tracing_context"
        else:
            shapes = "from_graph"
        facts = self.facts_for(graph) or ""
        with self.partitions_wrapped(), pass_context(compile_range, facts):
            artifact = torch_compat.standalone_compile(
                graph,
                example_inputs,
                dynamic_shapes=shapes,
                config_patches=self.options_for(compile_range, graph),
            )
            self.realign(artifact)
        return _piece(artifact, graph)

    def to_bytes(self, piece: CompiledPiece) -> bytes | None:
        """The artifact with its kernels, for the cache; None if torch could not keep it."""
        data = torch_compat.artifact_to_bytes(piece.artifact)
        mark = _PUBLIC if piece.direct is None else _DIRECT
        return None if data is None else mark + data

    def from_bytes(self, data: bytes, graph: torch.fx.GraphModule) -> CompiledPiece:
        """What `to_bytes` kept of ``graph``; raises whatever torch raises for bytes that it can't use."""
        mark, rest = data[: len(_DIRECT)], data[len(_DIRECT) :]
        with self.partitions_wrapped():
            artifact = torch_compat.artifact_from_bytes(rest)
            self.realign(artifact)
        return _piece(artifact, graph, vouched=mark == _DIRECT)


# A loaded artifact no longer has the record that says whether its wrappers have work to do; the mark keeps the finding.
_DIRECT, _PUBLIC = b"direct\n", b"public\n"


class InductorAdaptor(_Inductor):
    """Compiles through ``torch._inductor.compile_fx``, as the other one does; nothing can be kept.

    It needs the tracing context of the capture, as a Dynamo backend has it.
    """

    name = "inductor_compile_fx"

    def compile(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[object],
        config: CompilationConfig,
        compile_range: Range | None,
    ) -> CompiledPiece:
        if written_aliases(graph):
            return left_uncompiled(graph)
        _require_sizes(graph, example_inputs)
        counters.num_inductor_compiles += 1
        facts = self.facts_for(graph) or ""
        with self.partitions_wrapped(), pass_context(compile_range, facts):
            compiled = torch_compat.compile_fx(
                graph,
                example_inputs,
                own_shapes=compile_range is not None and compile_range.is_single_size(),
                config_patches=self.options_for(compile_range, graph),
            )
            self.realign(compiled)
        return CompiledPiece(compiled, indirect_because="compile_fx gives no artifact")


def _require_sizes(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> None:
    """Refuse a piece whose code would check a size that it is not given.

    Raises:
        CaptureError: the trace asserted something of a value that is no argument and no size of one.
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


def _piece(
    artifact: Callable[..., object],
    graph: torch.fx.GraphModule,
    *,
    vouched: bool = False,
) -> CompiledPiece:
    """The artifact, and its innermost function where nothing around it has anything to do."""
    inputs = len(graph.graph.find_nodes(op="placeholder"))
    returned = graph.graph.output_node().args[0]
    outputs = len(returned) if isinstance(returned, (list, tuple)) else -1
    call, reason = torch_compat.direct_entry(artifact, inputs, outputs, vouched=vouched)
    direct = None if call is None else positional(call, inputs)
    strict = torch_compat.strict_inputs(artifact, inputs)
    return CompiledPiece(artifact, artifact, direct, reason, strict)


def positional(call: Callable[..., object], inputs: int) -> Callable[..., object]:
    """``call``, which takes one list, as a function of ``inputs`` parameters.

    Written out for the number of parameters, which is half the cost of ``*args``.
    """
    names = ", ".join(f"a{i}" for i in range(inputs))
    scope: dict[str, Callable[..., object]] = {"call": call}
    exec(f"def piece({names}):\n    return call([{names}])", scope)
    return scope["piece"]


def _has_symbols(values: Sequence[object]) -> bool:
    """Whether a size is still symbolic: a single batch size leaves the other dynamic dimensions as they were."""
    return any(
        torch_compat.symbol_of(size) is not None
        for value in values
        for size in (value.shape if isinstance(value, torch.Tensor) else (value,))
    )
