"""Where an argument goes that a function does not take. In: its name. Out: a hint, for who comes from ``torch.compile`` or has a field of a configuration.

It decides nothing: a refusal has happened.
"""

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
    if "config" in parameters and name in _OF_TORCH_COMPILE:
        return _OF_TORCH_COMPILE[name]
    for where, fields in (
        ("config", CompilationConfig.model_fields),
        ("runtime_config", RuntimeConfig.model_fields),
    ):
        if where in parameters and name in fields:
            return f"it is a field of the configuration: {where}={{{name!r}: ...}}"
    return ""
