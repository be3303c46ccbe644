"""Settings of torch that a program changes while it runs. In: nothing. Out: those that change what Inductor makes of a graph, as text.

It never changes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

# Slots of Inductor's configuration that hold passes; torch leaves them out of what it can write down.
_PASS_SLOTS = (
    "pre_grad_custom_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "custom_partitioner_fn",
)


def torch_settings() -> dict[str, str]:
    """Setting → value: default dtype, determinism, precision of products, and what was changed in torch's configurations.

    What an environment variable set is not listed; it counts as one.
    """
    matmul = torch.backends.cuda.matmul
    found = {
        "default dtype": str(torch.get_default_dtype()),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "reduced precision": f"{matmul.allow_fp16_reduced_precision_reduction} "
        f"{matmul.allow_bf16_reduced_precision_reduction}",
        "mkldnn": str(torch.backends.mkldnn.enabled),
        "deterministic": f"{torch.are_deterministic_algorithms_enabled()} "
        f"{torch.is_deterministic_algorithms_warn_only_enabled()} "
        f"{torch.utils.deterministic.fill_uninitialized_memory}",
    }
    return found | dict(_changed_options())


def global_inductor_passes() -> dict[str, object]:
    """Passes that somebody has put into Inductor's own configuration, by slot."""
    import torch._inductor.config as inductor_config

    slots = {name: getattr(inductor_config, name, None) for name in _PASS_SLOTS}
    return {name: value for name, value in slots.items() if value is not None}


def _changed_options() -> Iterator[tuple[str, str]]:
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    for module in (inductor_config, functorch_config):
        counts = _options_that_count(module)
        for line in module.codegen_config().splitlines():
            path, equals, value = line.partition(" = ")
            name = path.removeprefix(module.__name__ + ".")
            if not equals or name == path or _was_put_back(module, name):
                continue
            if counts is None or name in counts:
                yield path.removeprefix("torch."), value


def _was_put_back(module: ModuleType, name: str) -> bool:
    """Whether an option was changed and has its default again; False where torch does not tell."""
    entry = getattr(module, "_config", {}).get(name)
    from_environment = isinstance(getattr(entry, "env_value_default", None), (bool, str))
    if entry is None or from_environment:
        return False
    return bool(getattr(module, name) == entry.default)


def _options_that_count(module: ModuleType) -> set[str] | None:
    """Options that torch's own cache keys hold; None where torch does not tell."""
    portable = getattr(module, "save_config_portable", None)
    return None if portable is None else set(portable())
