"""Classes whose instances compile themselves at their first call.

The class stays the class: no base is added, and a trace around it sees the plain model.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch

from piecework.errors import ConfigError, short_errors
from piecework.runtime.compile import compile_with_mode
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.groups import CompilationMode, DynamicShapesType, RuntimeConfig
from piecework.runtime.model_tag import ModelTag, current_model_tag, model_tag_is_set, use_model_tag
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.trace.dynamic_dims import DimsByName, dims_of, marked
from piecework.runtime.trace.sizes import DeclaredDimensions

ModuleClass = TypeVar("ModuleClass", bound=type[torch.nn.Module])
EnableIf = Callable[[CompilationConfig], bool]

_SUPPORT = "_piecework_support"  # on classes
_STATE = "_piecework_state"  # on instances
_LAYERS = "repeated_layers"
_SETTINGS = {"compilation_config": CompilationConfig, "runtime_config": RuntimeConfig}


@dataclass(frozen=True, slots=True)
class Support:
    """What a class was decorated with; the nearest one in the method resolution order holds."""

    dynamic_arg_dims: DimsByName | None = None
    mark_unbacked_dims: DimsByName | None = None
    enable_if: EnableIf | None = None
    repeated_layers: tuple[str, ...] | None = None
    ignored: bool = False


@overload
def support_torch_compile(cls: ModuleClass) -> ModuleClass: ...


@overload
def support_torch_compile(
    cls: None = None,
    *,
    dynamic_arg_dims: DimsByName | None = None,
    mark_unbacked_dims: DimsByName | None = None,
    enable_if: EnableIf | None = None,
    repeated_layers: Sequence[str] | None = None,
) -> Callable[[ModuleClass], ModuleClass]: ...


@short_errors
def support_torch_compile(
    cls: ModuleClass | None = None,
    *,
    dynamic_arg_dims: DimsByName | None = None,
    mark_unbacked_dims: DimsByName | None = None,
    enable_if: EnableIf | None = None,
    repeated_layers: Sequence[str] | None = None,
) -> ModuleClass | Callable[[ModuleClass], ModuleClass]:
    """Let instances of a module class compile themselves at their first call.

    An instance's configuration is ``compilation_config``: a keyword of the constructor (whether
    ``__init__`` names it or not), or an attribute of the instance or the class. ``runtime_config``, the
    program's limits, is given in the same ways.

    Args:
        cls: the class, when the decorator is used without parentheses.
        dynamic_arg_dims: parameter of ``forward`` → its dynamic dimension, or several. None infers them:
            the first dimension of every parameter annotated as something that holds tensors.
        mark_unbacked_dims: the same for dimensions that must serve 0, 1 and every other size alike.
        enable_if: told the configuration at the first call; False runs the instance as it is.
        repeated_layers: for configurations that don't say; see `CompilationConfig.repeated_layers`.

    Returns:
        The class itself. A subclass inherits the support, and infers from its own ``forward``. A
        decorated module inside another that is being compiled becomes part of that one.

    Raises:
        ConfigError: not a module class; no forward; a name that is no parameter of ``forward``; nothing
            declared and nothing annotated.

    Example:
        >>> @piecework.support_torch_compile(dynamic_arg_dims={"x": 0})
        ... class Model(torch.nn.Module): ...
        >>> Model(compilation_config=piecework.CompilationConfig(mode="PIECEWORK_COMPILE"))(x)
    """
    if enable_if is not None and not callable(enable_if):
        raise ConfigError(
            "enable_if must be callable with a configuration",
            where="enable_if",
            hint="write a function: enable_if=lambda config: config.backend == 'inductor'",
        )
    layers = None
    if repeated_layers is not None:
        layers = CompilationConfig.model_validate({_LAYERS: repeated_layers}).repeated_layers

    def decorate(kind: ModuleClass) -> ModuleClass:
        _require_module_class(kind, "support_torch_compile")
        if kind.forward is torch.nn.Module.forward:
            raise ConfigError(
                f"{kind.__qualname__} has no forward to compile",
                hint="define forward, and decorate the class that does",
            )
        # Found wrong here, the declaration is an error at import and not at the first request.
        dims_of(kind.forward, dynamic_arg_dims, mark_unbacked_dims, owner=kind)
        # Copies: the caller's mappings may change.
        mappings = (each and dict(each) for each in (dynamic_arg_dims, mark_unbacked_dims))
        setattr(kind, _SUPPORT, Support(*mappings, enable_if, layers))
        _take_config_keyword(kind)
        if not hasattr(kind.__call__, _SUPPORT):
            kind.__call__ = _compiling_call(kind.__call__)  # type: ignore[method-assign]
        return kind

    return decorate if cls is None else decorate(cls)


@short_errors
def ignore_torch_compile(cls: ModuleClass) -> ModuleClass:
    """Run instances of a class as they are, although a base class was decorated.

    Its subclasses are ignored too, until one is decorated; decorated modules inside are not.
    """
    _require_module_class(cls, "ignore_torch_compile")
    setattr(cls, _SUPPORT, Support(ignored=True))
    return cls


@short_errors
def stitched_of(model: torch.nn.Module) -> StitchedModule | None:
    """What an instance was compiled to; None before its first call, and where it runs unstitched."""
    state = vars(model).get(_STATE)
    there = isinstance(state, _State) and state.model is model and state.made
    return state.made if there and state.made.traces else None


def _require_module_class(cls: object, decorator: str) -> None:
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise ConfigError(
            f"{decorator} decorates classes of torch.nn.Module; got {cls!r:.80}",
            hint="use piecework.compile for a function or an instance",
        )


def _take_config_keyword(kind: type[torch.nn.Module]) -> None:
    """Make ``kind(…, compilation_config=…)`` set the attribute, and reach an ``__init__`` that asks."""
    original = kind.__init__
    parameters = inspect.signature(original).parameters
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()) and any(
        hasattr(base, _SUPPORT) or _SETTINGS.keys() & inspect.signature(base.__init__).parameters
        for base in kind.__bases__
    )

    @functools.wraps(original)
    def __init__(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        for name in _SETTINGS.keys() & kwargs:
            given = kwargs[name]
            if not (hands_on or name in parameters):
                del kwargs[name]
            if given is not None:
                vars(self)[name] = _SETTINGS[name].given(given, name, type(self).__qualname__)
        vars(self).setdefault(_STATE, _State(current_model_tag() if model_tag_is_set() else None))
        original(self, *args, **kwargs)

    kind.__init__ = __init__  # type: ignore[method-assign]


class _State:
    """What one instance was compiled to; a copy of the model gets a new one."""

    __slots__ = ("call", "lock", "made", "model", "tag")

    def __init__(self, tag: ModelTag | None = None) -> None:
        self.tag = tag  # the model tag at construction
        self.lock = threading.RLock()
        self.model: torch.nn.Module | None = None  # the instance, from its first call on
        self.call: Callable[..., object] | None = None  # what a call runs
        self.made: StitchedModule | None = None  # None where the instance runs as it is

    def __reduce__(self) -> tuple[type[_State], tuple[ModelTag | None]]:
        return _State, (self.tag,)


def _compiling_call(original: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def __call__(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        if torch.compiler.is_compiling():  # a trace, ours or an outer one, takes the model itself
            return original(self, *args, **kwargs)
        state = self.__dict__.get(_STATE)
        if state is None or state.model is not self:
            state = _at_first_call(self, original)
        return state.call(*args, **kwargs)  # type: ignore[misc]  # there since the first call

    setattr(__call__, _SUPPORT, True)
    return __call__


def _at_first_call(model: torch.nn.Module, original: Callable[..., object]) -> _State:
    state = vars(model).setdefault(_STATE, _State())
    if state.model not in (None, model):  # a shallow copy has the original's
        state = vars(model)[_STATE] = _State(state.tag)
    with state.lock:
        if state.model is None:
            state.call = _call_of(model, original, state)
            state.model = model
    return state


def _call_of(
    model: torch.nn.Module, original: Callable[..., object], state: _State
) -> Callable[..., object]:
    """What a call of the instance runs; its own first call compiles."""
    settings: dict[str, Any] = {}
    for name, kind in _SETTINGS.items():
        found = getattr(model, name, None)
        settings[name] = found and kind.given(found, name, type(model).__qualname__)
    config: CompilationConfig = settings["compilation_config"] or CompilationConfig()
    support: Support = getattr(type(model), _SUPPORT)
    if support.repeated_layers is not None and _LAYERS not in config.model_fields_set:
        config = config.replace(repeated_layers=support.repeated_layers)

    def plain(*args: object, **kwargs: object) -> object:
        """The call that the decorator replaced, with the name and the parameters of ``forward``."""
        return original(model, *args, **kwargs)

    signature = inspect.signature(model.forward)
    plain.__qualname__ = type(model).__name__
    plain.__signature__ = signature  # type: ignore[attr-defined]
    enabled = support.enable_if is None or support.enable_if(config)
    if support.ignored or config.mode is CompilationMode.NONE or not enabled:
        return plain
    dims = dims_of(
        model.forward, support.dynamic_arg_dims, support.mark_unbacked_dims, owner=type(model)
    )
    stock = config.mode is CompilationMode.STOCK_TORCH_COMPILE
    # What a subclass's own __call__ does around this one happens at each call, so it is not traced.
    whole = not stock and hasattr(type(model).__call__, _SUPPORT)
    shapes = config.dynamic_shapes_config.type
    with use_model_tag(current_model_tag() if model_tag_is_set() else state.tag):
        made = state.made = compile_with_mode(
            model if whole else plain,
            config=config,
            runtime_config=settings["runtime_config"],
            sizes=DeclaredDimensions(dims, model.forward),
            as_it_is=plain,
        )
    if stock or shapes is DynamicShapesType.AUTO:
        return made

    def first(*args: object, **kwargs: object) -> object:
        with marked(dims, signature.bind(*args, **kwargs).arguments, shapes):
            result = made(*args, **kwargs)
        if made.traces:
            state.call = made
        return result

    return first
