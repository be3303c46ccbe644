"""Inductor's options for one piece and batch range; its own configuration stays as it is."""

from __future__ import annotations

from piecework.errors import ConfigError
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.model import thaw
from piecework.runtime.passes import PostGradPassManager
from piecework.runtime.splitting_op import registry

#: Stands beside the real names where partitions are wrapped. Inductor's partitioning depends on whether a wrapper is set,
#: which its cache key does not show; this name is in the key and matches no operator.
_WRAPPED = "piecework::partitions_are_wrapped"


class InductorOptions:
    """The options of a configuration.

    Args:
        config: the resolved configuration.

    Attributes:
        passes: runs the passes on every piece.
        partition_ops: where Inductor cuts the code itself; empty unless ``use_inductor_graph_partition``.

    Raises:
        ConfigError: Inductor has no option or pass slot of a name, a pass can't be imported, or options contradict the
            graph partition.
    """

    def __init__(self, config: CompilationConfig) -> None:
        self.config = config
        self.passes = PostGradPassManager.from_config(config)
        self._always = thaw(config.inductor_compile_config) | self.passes.inductor_options(config)
        self._single_size = {k: thaw(v) for k, v in config.single_size_inductor_config.items()}
        self._check_names()

    @property
    def partition_ops(self) -> tuple[str, ...]:
        if not self.config.use_inductor_graph_partition:
            return ()
        ops = self.config.splitting_ops
        return registry.names() if ops is None else tuple(ops)

    def for_range(
        self, compile_range: Range | None, *, wraps_partitions: bool = False
    ) -> dict[str, object]:
        """The options for one batch range; a single size gets those of ``single_size_inductor_config`` on top.

        Args:
            compile_range: the batch sizes; None means all.
            wraps_partitions: whether something is done to each partition (static graphs).
        """
        # A piece holds no CUDA graphs of its own, whatever the environment tells Inductor: it is captured as it is.
        options = {"triton.cudagraphs": False, **self._always}
        if compile_range is not None and compile_range.is_single_size():
            options |= self._single_size
        if self.config.use_inductor_graph_partition:
            options["graph_partition"] = True
            wrapped = [_WRAPPED] if wraps_partitions else []
            options["custom_should_partition_ops"] = [*self.partition_ops, *wrapped]
        return options

    def identity(self) -> list[object]:
        """Everything in the options that changes compiled code, in a stable form."""
        plain = {**self.config.inductor_compile_config, "single size": self._single_size}
        passes = [each.uuid() for each in self.passes.passes]
        return [plain, passes, list(self.partition_ops)]

    def _check_names(self) -> None:
        fields = {
            "inductor_compile_config": self.config.inductor_compile_config,
            "single_size_inductor_config": self.config.single_size_inductor_config,
            "inductor_passes": self.config.inductor_passes,
        }
        for field, names in fields.items():
            unknown = [name for name in names if not torch_compat.has_inductor_option(name)]
            if unknown:
                raise ConfigError(
                    f"this torch's Inductor has no option {', '.join(map(repr, unknown))}",
                    where=f"{field}.{unknown[0]}",
                    hint="torch._inductor.list_options() lists them",
                )
        given, partitioned = (
            self._always | self._single_size,
            self.config.use_inductor_graph_partition,
        )
        own = "use_inductor_graph_partition sets it itself"
        for name, clashes, why in (
            (
                "triton.cudagraphs",
                given.get("triton.cudagraphs"),
                "a piece can't hold CUDA graphs of Inductor's: capture makes them",
            ),
            ("graph_partition", partitioned and "graph_partition" in given, own),
            (
                "custom_should_partition_ops",
                partitioned and "custom_should_partition_ops" in given,
                own,
            ),
            (
                "cpp_wrapper",
                partitioned and given.get("cpp_wrapper"),
                "Inductor does not partition code with a C++ wrapper",
            ),
        ):
            if clashes:
                where = f"inductor_compile_config.{name}"
                raise ConfigError(why, where=where, hint="leave the option out")
