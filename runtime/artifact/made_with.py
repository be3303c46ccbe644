"""How a stitched module was made. In: its configuration and arguments. Out: JSON data, and the first difference from an artifact's.

A module that is made by the same data does the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from piecework.codegen.split.split import SplittingOp, SplittingOps
from piecework.errors import ArtifactError
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.trace.sizes.example_sizes import SizePolicy


def made_with(
    config: CompilationConfig,
    runtime_config: RuntimeConfig | None,
    splitting_ops: Sequence[SplittingOp] | None,
    sizes: SizePolicy | None,
    kept: Mapping[str, object] | None,
) -> dict[str, object]:
    """How a module was made, as JSON data.

    Raises:
        ArtifactError: the configuration holds code.
    """
    runtime = None if runtime_config is None else json.loads(runtime_config.model_dump_json())
    return {
        "config": _config_data(config),
        "runtime config": runtime,
        "splitting ops": (
            None if splitting_ops is None else list(SplittingOps(splitting_ops).declared)
        ),
        "sizes": None if sizes is None else type(sizes).__name__,
        "kept": None if kept is None else dict(kept),
    }


def _config_data(config: CompilationConfig) -> dict[str, object]:
    try:
        data: dict[str, object] = json.loads(config.model_dump_json())
        same = CompilationConfig(**data) == config
    except Exception as error:
        raise ArtifactError(
            f"the configuration can't be written down: {error}",
            where="config",
            hint="leave passes and other objects out of it, or name them as text",
        ) from error
    if not same:
        raise ArtifactError(
            "the configuration can't be written down: it reads back as another one",
            where="config",
            hint="leave passes and other objects out of it, or name them as text",
        )
    return data


#: What of a configuration says where and how fast to compile.
_NO_EFFECT = frozenset({"cache_dir", "debug_dump_path", "compile_workers"})


def require_made_so(saved: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Raise `ArtifactError` where an artifact was made with other settings than are wanted."""
    for name, value in wanted.items():
        before = saved.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            keys = sorted(set(before) | set(value) - _NO_EFFECT)
            name, before, value = next(
                (
                    (f"{name} {k}", before.get(k), value.get(k))
                    for k in keys
                    if k not in _NO_EFFECT and before.get(k) != value.get(k)
                ),
                (name, None, None),
            )
        if before != value:
            raise ArtifactError(
                f"the artifact was made with {name} {before!r}, and {value!r} is wanted",
                where=name,
                hint="give it a directory of its own, or leave it as it was",
            )
