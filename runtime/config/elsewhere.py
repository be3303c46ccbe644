"""Hints for arguments that a function does not take, for whoever comes from ``torch.compile``."""

from __future__ import annotations

from collections.abc import Collection

from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.groups import RuntimeConfig

_OF_TORCH_COMPILE = {
    "mode": "torch.compile's presets are settings of Inductor here: config={'inductor_compile_config': {'max_autotune': True}}; "
    "static graphs come from capture([1, 2, 4]); piecework's own mode is config={'mode': ...}",
    "options": "Inductor's options go into config={'inductor_compile_config': {...}}, piecework's own into config={...}",
    "fullgraph": "leave it out: a model is captured whole, or refused",
    "dynamic": "leave it out: every dimension is dynamic, unless some are marked with torch._dynamo.mark_dynamic",
    "disable": "leave it out: config={'mode': 0} runs the model as it is, and so does TORCH_COMPILE_DISABLE=1",
}


def where_it_goes(name: str, parameters: Collection[str]) -> str:
    """Where a function with these parameters wants an argument that it has no parameter for; "" if that is not known."""
    groups = {"config": CompilationConfig, "runtime_config": RuntimeConfig}
    of_configuration = name in groups or any(name in each.model_fields for each in groups.values())
    if "config" in parameters and name in _OF_TORCH_COMPILE:
        return _OF_TORCH_COMPILE[name]
    if "dynamic_arg_dims" in parameters and (of_configuration or name in _OF_TORCH_COMPILE):
        return "a configuration belongs to the instances: Model(..., compilation_config={...})"
    if "path" in parameters and of_configuration:
        return "leave it out: an artifact holds what it was compiled with"
    for where, group in groups.items():
        if where in parameters and name in group.model_fields:
            return f"it is a field of the configuration: {where}={{{name!r}: ...}}"
    return ""
