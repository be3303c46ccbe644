"""Settings of torch that a program changes while it runs and that change what is compiled.

What torch can set and get counts without being named here, so that a new setting counts too.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from piecework.runtime.torch_compat.switches import autocast_state

# Slots that hold code, which torch leaves out of what it can write down of a configuration.
_PASS_SLOTS = {
    "torch._inductor.config": (
        *("pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass"),
        *("post_grad_custom_pre_pass", "post_grad_custom_post_pass", "custom_partitioner_fn"),
        *("_fuse_ddp_communication_passes", "_pre_fusion_custom_pass"),
        *("_post_fusion_custom_pass", "inductor_choices_class"),
    ),
    "torch._functorch.config": (
        *("joint_custom_pass", "activation_memory_budget_runtime_estimator"),
        "activation_memory_budget_solver",
    ),
}
_CONFIGURATIONS = (
    *("torch._inductor.config", "torch._inductor.config_comms"),
    *("torch._functorch.config", "torch.fx.experimental._config"),
)
# Pairs of a getter and a setter in torch's C++ that do not change what is compiled.
_NO_EFFECT = frozenset(
    {
        *("autograd_fallback_mode", "backcompat_broadcast_warn", "backcompat_keepdim_warn"),
        *("dispatch_mode", "graph_exec_group", "graph_executor_optimize"),
        *("sm_carveout_experimental", "tensor_metadata", "thread_name", "torch_function_state"),
        *("tracing_state", "value_trace", "warnAlways"),
    }
)
_PRECISIONS = (
    *("", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn"),
    *("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
)


def torch_settings() -> dict[str, object]:
    """Setting → value: modes, default dtype and device, determinism, precisions, kernels."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "autocast": [*on, torch.is_autocast_cache_enabled()] if (on := autocast_state()) else [],
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ],
        "xnnpack": torch._C._is_xnnpack_enabled(),
        "attention kernels": _attention_kernels(),
        "mha fast path": torch.backends.mha.get_fastpath_enabled(),
        "opt_einsum": [torch.backends.opt_einsum.enabled, torch.backends.opt_einsum.strategy],
        **dict(_pairs()),
        **dict(_precisions()),
    }


def _attention_kernels() -> list[object]:
    cuda = torch.backends.cuda
    names = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")
    return [getattr(cuda, f"{each}_enabled", bool)() for each in names]


def _pairs() -> Iterator[tuple[str, object]]:
    """Everything that torch's C++ has both a getter and a setter for."""
    for name in dir(torch._C):
        short = name.removeprefix("_get_")
        if short == name or short in _NO_EFFECT or not hasattr(torch._C, f"_set_{short}"):
            continue
        try:
            value = getattr(torch._C, name)()
        except TypeError:  # it takes something: a property of that, and no setting
            continue
        # Enumerations of C++ are not Python's; their text is type, name and number.
        yield short, value if isinstance(value, (bool, int, str, list, tuple)) else str(value)


def _precisions() -> Iterator[tuple[str, object]]:
    for name in _PRECISIONS:
        place: object = torch.backends
        for part in name.split(".") if name else ():
            place = getattr(place, part, None)
        found = getattr(place, "fp32_precision", None)
        if found is not None:  # "none" is full precision that nobody has asked for
            yield f"fp32 precision {name}".strip(), "ieee" if found == "none" else found


def global_passes() -> dict[str, object]:
    """Code that was put into torch's configurations or registered with Inductor, by place."""
    found: dict[str, object] = {}
    for module, slots in _PASS_SLOTS.items():
        config = importlib.import_module(module)
        for slot in slots:
            value, entry = getattr(config, slot, None), config._config.get(slot)
            if value is not None and not _same(value, getattr(entry, "default", None)):
                found[f"{module.removeprefix('torch.')}.{slot}"] = value
    return found | dict(_registered())


def _same(value: object, default: object) -> bool:
    """Whether a slot holds what it held from the start; torch keeps a copy of a list."""
    if type(value) is list and type(default) is list and len(value) == len(default):
        return all(map(_same, value, default))
    return value is default or (type(value) is type(default) is str and value == default)


def _registered() -> Iterator[tuple[str, object]]:
    """Lowerings, decompositions and passes that are not torch's own."""
    common = sys.modules.get("torch._inductor.codegen.common")
    for name in ("custom_backend_passes", "custom_backend_codegen_configs"):
        table = getattr(common, name, None) or {}
        yield from ((f"{name}.{key}", each) for key, each in table.items() if each is not None)
    for name in ("lowerings", "decompositions"):
        module = f"torch._inductor.{name.removesuffix('s')}"
        # What is not loaded was not added to; loading it costs a second.
        for op, each in getattr(sys.modules.get(module), name, {}).items():
            if not _is_of_torch(each):
                yield f"{name}.{op}", each


def _is_of_torch(function: object) -> bool:
    inner = getattr(function, "func", function)  # a partial
    # torch 2.11 lowers some operators of Python by themselves.
    own = ("torch", "functools", "_operator", "math")
    return str(getattr(inner, "__module__", "torch")).partition(".")[0] in own


def torch_options() -> tuple[dict[str, object], dict[str, object]]:
    """torch's options that its own cache keys count: all, and those not at their default."""
    found: dict[str, object] = {}
    changed: dict[str, object] = {}
    for name in _CONFIGURATIONS:
        module = importlib.import_module(name)
        for option, value in module.save_config_portable(ignore_private_configs=False).items():
            if not option.startswith(("_save_", "_cache_")):
                full = f"{name.removeprefix('torch.')}.{option}"
                found[full] = value
                if value != module._config[option].default:
                    changed[full] = value
    return found, changed


def aot_settings_unset() -> AbstractContextManager[None]:
    """What Dynamo's AOT compile sets around a backend is at its defaults in the block."""
    from torch._functorch import config

    names = ("strict_autograd_cache", "bypass_autograd_cache_key", "bundled_autograd_cache")
    more = ("force_non_lazy_backward_lowering", "force_autograd_cache")
    entries = config._config  # type: ignore[attr-defined]
    unset = {name: entries[name].default for name in (*names, *more) if name in entries}
    return config.patch(unset)  # type: ignore[attr-defined, no-any-return]
