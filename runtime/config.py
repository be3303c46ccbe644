"""What is compiled and how: in, options by name; out, one frozen, validated CompilationConfig.

It never changes after it is made: resolving against a RuntimeConfig returns a new object.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from piecework.runtime.config_groups import (
    CompilationMode,
    CUDAGraphModeField,
    DynamicShapesConfig,
    DynamicShapesType,
    ModeField,
    PassConfig,
    StitchingConfig,
)
from piecework.runtime.config_model import KEY, FrozenMap, FrozenModel, ignored, thaw
from piecework.runtime.graphs.mode import CUDAGraphMode
from pydantic import AfterValidator, AliasChoices, Field, PlainSerializer

__all__ = [
    "CUDAGraphMode",
    "CompilationConfig",
    "CompilationMode",
    "DynamicShapesConfig",
    "DynamicShapesType",
    "PassConfig",
    "RuntimeConfig",
    "StitchingConfig",
]

_A_PATH = "a path does not change what is compiled"
OptionMap = Annotated[Mapping[str, Any], AfterValidator(FrozenMap), PlainSerializer(thaw)]


class CompilationConfig(FrozenModel):
    """Everything that decides how a model is captured, split, compiled, stitched and replayed."""

    mode: Annotated[ModeField, KEY] = Field(
        CompilationMode.PIECEWORK_COMPILE,
        description="NONE, STOCK_TORCH_COMPILE, DYNAMO_TRACE_ONCE or PIECEWORK_COMPILE.",
    )
    backend: Annotated[str, KEY] = Field(
        "inductor",
        min_length=1,
        description="The compiler of a piece: inductor, eager (compiles nothing) or a qualified name.",
    )
    debug_dump_path: Annotated[Path | None, ignored(_A_PATH)] = Field(
        None, description="A folder for the numbered stages of each compilation."
    )
    cache_dir: Annotated[Path | None, ignored(_A_PATH)] = Field(
        None, description="The compile cache's folder; None is the user's cache folder."
    )
    splitting_ops: Annotated[tuple[str, ...] | None, KEY] = Field(
        None,
        description="Where the graph is cut, `ns::op` or `ns::op.overload`; None is every op registered with piecework.splitting_op.",
    )
    compile_sizes: Annotated[tuple[int, ...], KEY] = Field(
        (), description="Batch sizes that are compiled for exactly that size."
    )
    compile_ranges_endpoints: Annotated[tuple[int, ...], KEY] = Field(
        (),
        validation_alias=AliasChoices("compile_ranges_endpoints", "compile_ranges_split_points"),
        description="The last size of each compiled range but the last.",
    )
    inductor_compile_config: Annotated[OptionMap, KEY] = Field(
        {}, description="Options passed to Inductor."
    )
    cudagraph_mode: Annotated[CUDAGraphModeField, KEY] = Field(
        CUDAGraphMode.NONE, description="Which static graphs are captured."
    )
    dynamic_shapes_config: Annotated[DynamicShapesConfig, KEY] = Field(
        DynamicShapesConfig(), description="How dynamic dimensions are traced."
    )
    pass_config: Annotated[PassConfig, KEY] = Field(
        PassConfig(), description="Which built-in graph passes run."
    )
    stitching_config: Annotated[StitchingConfig, KEY] = Field(
        StitchingConfig(), description="The levers of the stitched function."
    )


class RuntimeConfig(FrozenModel):
    """What the parts read of the program around the model: batch limits, ranks, dtype, name."""

    max_num_batched_tokens: Annotated[int, KEY] = Field(
        8192, ge=1, description="The most tokens in one forward."
    )
    max_num_seqs: Annotated[int, KEY] = Field(
        256, ge=1, description="The most requests in one forward."
    )
    rank: Annotated[int, ignored("ranks have folders of their own")] = Field(
        0, ge=0, description="This process's rank."
    )
    dp_rank: Annotated[int, ignored("ranks have folders of their own")] = Field(
        0, ge=0, description="This process's data-parallel rank."
    )
    world_size: Annotated[int, KEY] = Field(1, ge=1, description="How many ranks there are.")
    dtype: Annotated[str, KEY] = Field("float32", description="The model's dtype, by name.")
    model_name: Annotated[str, ignored("only a label")] = Field(
        "", description="The model's name in reports."
    )
