"""Classes whose instances compile themselves at their first call.

The class stays the class: no base is added, no source is changed, and a trace around it sees the plain model.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, overload

import torch

from piecework.errors import ConfigError, short_errors
from piecework.runtime import torch_compat
from piecework.runtime.call.failures import add_piece_note
from piecework.runtime.compile import UnstitchedModule, compile_with_mode
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.elsewhere import where_it_goes
from piecework.runtime.config.groups import CompilationMode, DynamicShapesType, RuntimeConfig
from piecework.runtime.config.model import FrozenModel
from piecework.runtime.model_tag import (
    ModelTag,
    compilation_complete,
    current_model_tag,
    model_tag_is_set,
    set_on_compilation_complete,
    use_model_tag,
)
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.trace.dynamic_dims import DimsByName, dims_of, marked
from piecework.runtime.trace.sizes import DeclaredDimensions

_log = logging.getLogger(__name__)

ModuleClass = TypeVar("ModuleClass", bound=type[torch.nn.Module])
Settings = TypeVar("Settings", bound=FrozenModel)
EnableIf = Callable[[CompilationConfig], bool]

_SUPPORT = "_piecework_support"  # on classes
_STATE = "_piecework_state"  # on instances
_CONFIG = "compilation_config"
_RUNTIME = "runtime_config"
_LAYERS = "repeated_layers"
_SETTINGS: dict[str, type[FrozenModel]] = {_CONFIG: CompilationConfig, _RUNTIME: RuntimeConfig}


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


@partial(short_errors, elsewhere=where_it_goes)
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
    """What an instance of a decorated class was compiled to; None before its first call, and where it runs unstitched."""
    state = vars(model).get(_STATE)
    if not isinstance(state, _State) or state.model is not model:
        return None
    return None if isinstance(state.made, UnstitchedModule) else state.made


def _require_module_class(cls: object, decorator: str) -> None:
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise ConfigError(
            f"{decorator} decorates classes of torch.nn.Module; got {cls!r:.80}",
            hint="use piecework.compile for a function or an instance",
        )


# --- construction --------------------------------------------------------------------------------


def _take_config_keyword(kind: type[torch.nn.Module]) -> None:
    """Make ``kind(…, compilation_config=…, runtime_config=…)`` set the attributes, and reach an ``__init__`` that asks for them."""
    original = kind.__init__
    passed_on = {name: _wants(kind, name) for name in _SETTINGS}

    @functools.wraps(original)
    def __init__(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        for name, model in _SETTINGS.items():
            if name not in kwargs:
                continue
            given = kwargs[name] if passed_on[name] else kwargs.pop(name)
            if given is not None:
                vars(self)[name] = model.given(given, name, type(self).__qualname__)
        vars(self).setdefault(_STATE, _State(current_model_tag() if model_tag_is_set() else None))
        original(self, *args, **kwargs)

    kind.__init__ = __init__  # type: ignore[method-assign]


def _wants(kind: type[torch.nn.Module], name: str) -> bool:
    """Whether the constructor takes a configuration itself: by name, or for a base class that does."""
    for each in kind.__mro__:
        init = vars(each).get("__init__")
        if init is None or each is torch.nn.Module:
            continue
        parameters = inspect.signature(init).parameters
        if name in parameters or (init is not kind.__init__ and hasattr(each, _SUPPORT)):
            return True
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return False
    return False


# --- calls -----------------------------------------------------------------------------------------


class _State:
    """What one instance was compiled to; a copy of the model gets a new one.

    Attributes:
        model: the instance; None until its first call.
        call: what a call runs.
        made: the compiled model behind it; None where the instance runs as it is.
        tag: the model tag at construction.
        said: the switch of torch's compiler that was logged.
    """

    __slots__ = ("call", "lock", "made", "model", "said", "tag")

    def __init__(self, tag: ModelTag | None = None) -> None:
        self.tag = tag
        self.lock = threading.RLock()
        self.model: torch.nn.Module | None = None
        self.call: Callable[..., object] | None = None
        self.made: StitchedModule | None = None
        self.said: str | None = None

    def __copy__(self) -> _State:
        return _State(self.tag)

    def __deepcopy__(self, memo: object) -> _State:
        return _State(self.tag)

    def __reduce__(self) -> tuple[type[_State], tuple[ModelTag | None]]:
        return _State, (self.tag,)


def _compiling_call(original: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def __call__(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        if torch.compiler.is_compiling():  # a trace, ours or an outer one, takes the model itself
            return original(self, *args, **kwargs)
        state = self.__dict__.get(_STATE)
        if state is None or state.model is not self or state.call is None:
            state = _at_first_call(self, original, args, kwargs)
            if state.call is None:  # torch's compiler is switched off
                return original(self, *args, **kwargs)
        try:
            return state.call(*args, **kwargs)  # type: ignore[misc]  # there since the first call
        except Exception as error:
            if state.made is not None and not isinstance(state.made, UnstitchedModule):
                add_piece_note(error, state.made.source)
            raise

    setattr(__call__, _SUPPORT, True)
    return __call__


def _at_first_call(
    model: torch.nn.Module,
    original: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> _State:
    state = vars(model).setdefault(_STATE, _State())
    if state.model not in (None, model):  # a shallow copy has the original's
        state = vars(model)[_STATE] = _State(state.tag)
    with state.lock:
        if state.call is None:
            _compile(state, model, original, args, kwargs)
    return state


def _compile(
    state: _State,
    model: torch.nn.Module,
    original: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> None:
    """Fill ``state``; on an exception, and while torch's compiler is off, it is as before, and the next call tries again."""
    config = _given(model, _CONFIG, CompilationConfig) or CompilationConfig()
    support: Support = getattr(type(model), _SUPPORT)
    if support.repeated_layers is not None and _LAYERS not in config.model_fields_set:
        config = config.replace(repeated_layers=support.repeated_layers)
    plain = _without_decorator(model, original)
    if (
        support.ignored
        or config.mode is CompilationMode.NONE
        or not (support.enable_if is None or support.enable_if(config))
    ):
        state.call, state.model = plain, model
        return
    switch = torch_compat.compiler_off()
    if switch is not None:
        if switch != state.said:
            state.said = switch
            _log.warning("%s runs as it is, uncompiled: %s", type(model).__name__, switch)
        return
    stock = config.mode is CompilationMode.STOCK_TORCH_COMPILE
    # What a subclass's own __call__ does around this one happens at each call, so it is not traced.
    whole = not stock and hasattr(type(model).__call__, _SUPPORT)
    dims = dims_of(
        model.forward, support.dynamic_arg_dims, support.mark_unbacked_dims, owner=type(model)
    )
    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes, sizes = config.dynamic_shapes_config.type, None
    with ExitStack() as stack:
        # The instance does not hold it yet.
        stack.enter_context(set_on_compilation_complete(lambda: None))
        if state.tag is not None and not model_tag_is_set():
            stack.enter_context(use_model_tag(state.tag))
        if shapes is DynamicShapesType.AUTO and not stock:
            sizes = DeclaredDimensions(dims, model.forward)
        else:
            stack.enter_context(marked(dims, arguments, shapes))
        state.made = compile_with_mode(
            *(model if whole else plain, args, kwargs),
            config=config,
            runtime_config=_given(model, _RUNTIME, RuntimeConfig),
            sizes=sizes,
            as_it_is=plain,
        )
    state.model, state.call = model, state.made
    if not stock:  # torch compiles in the call that follows
        compilation_complete()


def _without_decorator(
    model: torch.nn.Module, original: Callable[..., object]
) -> Callable[..., object]:
    """The call that the decorator replaced, with the name and the parameters of ``forward``."""

    def plain(*args: object, **kwargs: object) -> object:
        return original(model, *args, **kwargs)

    plain.__qualname__ = type(model).__name__
    plain.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return plain


def _given(model: torch.nn.Module, name: str, kind: type[Settings]) -> Settings | None:
    """The settings of this name that the instance or its class has."""
    found = getattr(model, name, None)
    return None if found is None else kind.given(found, name, type(model).__qualname__)
