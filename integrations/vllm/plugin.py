"""The entry point ``vllm.general_plugins``: by ``{"backend": "piecework"}``, or VLLM_PIECEWORK=1.

vLLM knows two compilers by name; methods that it settles one by are wrapped, once a process.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from piecework.errors import ConfigError, PieceworkError

VERSIONS = ("0.32.0",)  # of vLLM, that the tests ran with
NAME = "piecework"
_MARK = "__piecework__"
_log = logging.getLogger("vllm.piecework")


def register() -> None:
    """Make vLLM know the backend ``piecework``; it may be called again and again."""
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.platforms import current_platform

    _wrap(CompilationConfig, "__post_init__", _accept)
    _wrap(CompilationConfig, "init_backend", _choose_backend)
    _wrap(VllmConfig, "__post_init__", _settle)
    _wrap(type(current_platform), "check_and_update_config", _keep_mode)


def version() -> str:
    """vLLM's version, as its package says it."""
    from vllm import __version__

    return str(__version__).partition("+")[0]


def require_known_version() -> None:
    """Raise `ConfigError` unless this vLLM is one that piecework ran with."""
    if version() not in VERSIONS:
        why = f"piecework was not run with vLLM {version()}"
        hint = f"leave the backend to vLLM, or install {' or '.join(VERSIONS)}"
        raise ConfigError(why, where="backend", hint=hint)


def _wrap(owner: Any, name: str, instead: Callable[..., Any]) -> None:
    """Let ``instead`` be called with a method's own function and the arguments of a call."""
    held = getattr(owner, name)
    function = getattr(held, "__func__", held)
    if hasattr(function, _MARK):
        return

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return instead(function, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped if held is function else classmethod(wrapped))


def wanted(config: Any) -> bool:
    """Whether a configuration of vLLM's is for piecework, by its own word or the environment's."""
    by_variable = os.environ.get("VLLM_PIECEWORK", "") not in ("", "0")
    return config.backend == NAME or (by_variable and config.backend in ("", "inductor"))


@contextmanager
def _as_inductor(config: Any) -> Iterator[None]:
    """Let vLLM settle by its compiler's name what it does for Inductor."""
    config.backend = "inductor"
    try:
        yield
    finally:
        config.backend = NAME


def _accept(original: Callable[..., None], self: Any) -> None:
    """vLLM's own check refuses a third compiler in its mode 3."""
    with _as_inductor(self) if self.backend == NAME else nullcontext():
        original(self)


def _settle(original: Callable[..., None], self: Any) -> None:
    config = self.compilation_config
    if not wanted(config):
        return original(self)
    from vllm.compilation import decorators, wrapper
    from vllm.config import CompilationMode

    require_known_version()
    _wrap(wrapper.TorchCompileWithNoGuardsWrapper, "aot_compile", _compile_and_forward)
    _wrap(decorators, "_try_load_aot_compiled_fn", _load_sealed)
    if config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        why = "vLLM's mode 1 calls a backend without the engine's configuration"
        raise ConfigError(why, where="mode", hint="leave the mode out")
    if config.use_inductor_graph_partition:
        why = "piecework cuts the graph itself, before Inductor"
        raise ConfigError(why, where="use_inductor_graph_partition", hint="leave it out")
    if config.mode == CompilationMode.DYNAMO_TRACE_ONCE:
        config.mode = CompilationMode.VLLM_COMPILE  # one trace too, and with its static graphs
    with _as_inductor(config):
        vars(config).setdefault("_piecework", {})  # what was compiled, by name
        original(self)
    if config.mode == CompilationMode.NONE:
        _log.info("piecework: vLLM compiles nothing here (enforce_eager, LoRA on the CPU, …)")
        return None
    if config.mode != CompilationMode.VLLM_COMPILE:
        raise ConfigError(f"vLLM made it {config.mode}, for another compiler", where="mode")
    _log.info(
        "piecework compiles this engine: %d splitting ops, cudagraph_mode %s, custom_ops %s",
        len(config.splitting_ops or ()),
        config.cudagraph_mode.name,
        ",".join(config.custom_ops),
    )


def _keep_mode(original: Callable[..., None], cls: Any, vllm_config: Any) -> None:
    """A platform may leave vLLM's own compiler for plain Inductor, as the CPU's does; not here."""
    from vllm.config import CompilationMode

    config = vllm_config.compilation_config
    if not hasattr(config, "_piecework"):
        return original(cls, vllm_config)
    before = config.mode
    sizes = config.cudagraph_capture_sizes
    original(cls, vllm_config)
    if before == CompilationMode.VLLM_COMPILE != config.mode != CompilationMode.NONE:
        config.mode = before
    if cls.support_static_graph_mode():
        config.cudagraph_capture_sizes = sizes


def _choose_backend(
    original: Callable[..., Any],
    self: Any,
    vllm_config: Any,
    prefix: str = "",
    is_encoder: bool = False,
) -> Any:
    if self.backend != NAME:
        return original(self, vllm_config, prefix=prefix, is_encoder=is_encoder)
    from piecework.integrations.vllm.engine import EngineBackend

    return EngineBackend(vllm_config, prefix, is_encoder)


def _compile_and_forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from piecework.runtime.compilers.inductor import begin_test

    begin_test()
    return _forward(original(*args, **kwargs))


def _load_sealed(original: Callable[..., Any], model: Any, path: str) -> Any:
    """vLLM unpickles what it kept unseen."""
    from vllm import envs

    from piecework.integrations.vllm.forward import require_sealed

    if model.compilation_config.backend == NAME and os.path.exists(path):
        try:
            require_sealed(path)
        except (PieceworkError, OSError) as error:
            if envs.VLLM_FORCE_AOT_LOAD:
                raise
            _log.warning("Compiling model again due to a load failure: %s", error)
            return None
    return _forward(original(model, path))


def _forward(compiled: Any) -> Any:
    """``compiled`` as a `Forward`, if it is piecework's."""
    from piecework.integrations.vllm.engine import Served
    from piecework.integrations.vllm.forward import Forward

    ours = compiled is not None and isinstance(compiled._artifacts.compiled_fn, Served)
    return Forward(compiled) if ours else compiled
