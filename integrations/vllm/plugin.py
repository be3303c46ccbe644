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

    _wrap(CompilationConfig, "__post_init__", _accepting)
    _wrap(CompilationConfig, "init_backend", _choosing)
    _wrap(VllmConfig, "__post_init__", _settling)
    _wrap(type(current_platform), "check_and_update_config", _keeping_mode)


def version() -> str:
    """vLLM's version, as its package says it."""
    from vllm import __version__

    return str(__version__).partition("+")[0]


def require_known_version() -> None:
    """Raise `ConfigError` unless this vLLM is one that piecework ran with."""
    if version() not in VERSIONS:
        raise ConfigError(
            f"piecework was not run with vLLM {version()}",
            where="backend",
            hint=f"leave the backend to vLLM, or install {' or '.join(VERSIONS)}",
        )


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Any]) -> None:
    held = getattr(owner, name)
    function = getattr(held, "__func__", held)
    if hasattr(function, _MARK):
        return
    wrapped = functools.wraps(function)(wrapper(function))
    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped if held is function else classmethod(wrapped))


def wanted(config: Any) -> bool:
    """Whether a configuration of vLLM's is for piecework, by its own word or the environment's."""
    by_variable = os.environ.get("VLLM_PIECEWORK", "") not in ("", "0")
    return config.backend == NAME or (by_variable and config.backend in ("", "inductor"))


@contextmanager
def _as_inductor(config: Any) -> Iterator[None]:
    """What vLLM settles by its compiler's name (fusion instead of custom ops, priorities, ranges) is settled as for Inductor."""
    config.backend = "inductor"
    try:
        yield
    finally:
        config.backend = NAME


def _accepting(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM's own check refuses a third compiler in its mode 3."""

    def post_init(self: Any) -> None:
        with _as_inductor(self) if self.backend == NAME else nullcontext():
            original(self)

    return post_init


def _settling(original: Callable[..., None]) -> Callable[..., None]:
    def post_init(self: Any) -> None:
        config = self.compilation_config
        if not wanted(config):
            return original(self)
        from vllm.compilation import decorators, wrapper
        from vllm.config import CompilationMode

        require_known_version()
        _wrap(wrapper.TorchCompileWithNoGuardsWrapper, "aot_compile", _forwarding)
        _wrap(decorators, "_try_load_aot_compiled_fn", _checking)
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

    return post_init


def _keeping_mode(original: Callable[..., None]) -> Callable[..., None]:
    """A platform may leave vLLM's own compiler for plain Inductor, as the CPU's does; not where it is piecework's turn."""

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
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

    return check_and_update_config


def _choosing(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_backend(
        self: Any, vllm_config: Any, prefix: str = "", is_encoder: bool = False
    ) -> Any:
        if self.backend != NAME:
            return original(self, vllm_config, prefix=prefix, is_encoder=is_encoder)
        from piecework.integrations.vllm.engine import EngineBackend

        return EngineBackend(vllm_config, prefix, is_encoder)

    return init_backend


def _forwarding(original: Callable[..., Any]) -> Callable[..., Any]:
    def aot_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        from piecework.runtime.compilers.inductor import begin_test

        begin_test()
        return _forward(original(self, *args, **kwargs))

    return aot_compile


def _checking(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM unpickles what it kept unseen."""

    def try_load(model: Any, path: str) -> Any:
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

    return try_load


def _forward(compiled: Any) -> Any:
    """``compiled`` as a `Forward`, if it is piecework's."""
    from piecework.integrations.vllm.engine import Served
    from piecework.integrations.vllm.forward import Forward

    ours = compiled is not None and isinstance(compiled._artifacts.compiled_fn, Served)
    return Forward(compiled) if ours else compiled
