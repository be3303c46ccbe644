"""Compilation by mode: the model as it is, torch's own compilation of it, one piece, or many."""

import logging
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from piecework import errors
from piecework.codegen.split.splitting import SplittingOp as SplittingOpLike
from piecework.runtime import torch_compat
from piecework.runtime.artifact.model import Artifact
from piecework.runtime.batch.sizes import require_positive_sizes
from piecework.runtime.call.shared_module import require_model
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.groups import CompilationMode, RuntimeConfig
from piecework.runtime.model_tag import compilation_complete
from piecework.runtime.splitting_op import registry
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.package import Place, file_of
from piecework.runtime.trace.sizes import SizePolicy

_log = logging.getLogger(__name__)

_UNSTITCHED = (CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE)


@errors.short_errors
def compile(
    model: Callable[..., object],
    example_args: Sequence[object] = (),
    example_kwargs: Mapping[str, object] | None = None,
    *,
    splitting_ops: Sequence[SplittingOpLike] | None = None,
    config: CompilationConfig | Mapping[str, object] | None = None,
    runtime_config: RuntimeConfig | Mapping[str, object] | None = None,
    sizes: Iterable[int] = (),
    artifact: Place | None = None,
    key_file: str | os.PathLike[str] | None = None,
) -> StitchedModule:
    """Compile ``model`` piecewise and stitch it, or as ``config.mode`` says.

    Args:
        model: a module or function, traced whole.
        example_args, example_kwargs: arguments to trace with, by shape and dtype only. Every dimension
            becomes dynamic unless some are marked with ``torch._dynamo.mark_dynamic`` or
            ``mark_unbacked``. Without them the first call's are used.
        splitting_ops: where to cut; None means every op registered with `splitting_op`.
        config: a `CompilationConfig`, or a dict of its fields.
        runtime_config: the program's limits, a `RuntimeConfig` or a dict of its fields.
        sizes: batch sizes whose traces are made now, where the first one does not serve them.
        artifact: a file that ``StitchedModule.save`` writes. What lies there is loaded if it fits;
            else the model is compiled and saved there.
        key_file: a secret that signs and verifies the artifact; see ``StitchedModule.save``.

    Returns:
        A `StitchedModule`, called like ``model``. It serves inference: it records no gradients. Modes
        ``NONE`` and ``STOCK_TORCH_COMPILE`` stitch nothing. While torch's compiler is switched off, the
        model runs as it is.

    Raises:
        CaptureError: the model can't be captured as one graph.
        ConfigError: an argument or the configuration does not fit.
        SplitError: a splitting op is unknown or has no fake implementation.
        PieceCompileError: a compiler failed on a piece.

    Example:
        >>> stitched = piecework.compile(model, (torch.randn(4, 64),))
        >>> print(stitched.source.code)
        >>> stitched(torch.randn(7, 64))
    """
    made = compile_with_mode(
        model,
        *((example_args, example_kwargs) if artifact is None else ()),
        splitting_ops=splitting_ops,
        config=config,
        runtime_config=runtime_config,
        deferred=artifact is not None,
    )
    if artifact is not None:
        args, kwargs = example_args, example_kwargs or {}
        require_stitching(made.config)
        if not (args or kwargs):
            why = "an artifact is made or loaded for example arguments, and there are none"
            raise errors.ConfigError(why, where="artifact", hint="pass example_args")
        take = partial(made.take_for, args=args, kwargs=kwargs)
        if not take_if_it_fits(artifact, key_file, take):
            made.prepare(*args, **kwargs)
            if made.traces:
                keep(partial(made.save, artifact, key_file=key_file), artifact)
    if wanted := require_positive_sizes(sizes):
        made.trace_ahead(wanted)
    return made


@errors.short_errors
def load(
    path: Place,
    model: Callable[..., object],
    *,
    key_file: str | os.PathLike[str] | None = None,
) -> StitchedModule:
    """What ``StitchedModule.save`` wrote, for a model of this process: nothing is traced or compiled.

    Args:
        path: the file.
        model: a model like the saved one, whose weights' values are its own.
        key_file: a file with the secret that the artifact must be signed with; by default the one that
            ``PIECEWORK_CACHE_KEY_FILE`` names, if any.

    Raises:
        ArtifactError: the artifact is missing, damaged, not signed by the key, or made for another
            model, torch, Python, piecework or machine; nothing was loaded then.
    """
    require_model(model)
    found = Artifact.open(path, key_file)
    facts = found.package.facts
    kept = facts.get("kept")
    if kept is not None:
        raise errors.ArtifactError(
            "the artifact is of a model that was stitched in place, and holds what that takes",
            where=str(path),
            hint=f"{kept['load']}(path, model) loads it",  # type: ignore[index]
        )
    config, runtime, ops = facts["config"], facts["runtime config"], facts["splitting ops"]
    made = StitchedModule(
        torch_compat.original_of(model),
        splitting_ops=ops,  # type: ignore[arg-type]
        config=CompilationConfig.given(config, "config"),
        runtime_config=None if runtime is None else RuntimeConfig.given(runtime, "runtime config"),
    )
    made.take(found)
    return made


def require_stitching(config: CompilationConfig | None) -> None:
    """Raise `ConfigError` for a mode that compiles nothing which could be saved."""
    if config is not None and config.mode in _UNSTITCHED:
        why = f"mode {config.mode} compiles nothing that could be saved"
        hint = "use DYNAMO_TRACE_ONCE or PIECEWORK_COMPILE"
        raise errors.ConfigError(why, where="artifact", hint=hint)


def take_if_it_fits(
    path: Place, key_file: str | os.PathLike[str] | None, take: Callable[[Artifact], None]
) -> bool:
    """Give an artifact to ``take``; False where none fits, and a warning says why."""
    try:
        if not file_of(path).exists():
            return False
        take(Artifact.open(path, key_file))
    except errors.ArtifactError as error:
        _log.warning("the artifact %s does not fit, the model is compiled again: %s", path, error)
        return False
    return True


def keep(save: Callable[[], None], path: Place) -> None:
    """Save what was compiled to ``path``; a warning says why it can't be."""
    try:
        save()
    except errors.ArtifactError as error:
        _log.warning("the compiled model is not saved to %s: %s", path, error)


def compile_with_mode(
    model: Callable[..., object],
    example_args: Sequence[object] = (),
    example_kwargs: Mapping[str, object] | None = None,
    *,
    splitting_ops: Sequence[SplittingOpLike] | None = None,
    config: CompilationConfig | Mapping[str, object] | None = None,
    sizes: SizePolicy | None = None,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    runtime_config: RuntimeConfig | Mapping[str, object] | None = None,
    as_it_is: Callable[..., object] | None = None,
    kept: Mapping[str, object] | None = None,
    deferred: bool = False,
) -> StitchedModule:
    """A model as ``config.mode`` says; ``deferred``: a missing compiler is refused at its use."""
    require_model(model)
    config = CompilationConfig.given({} if config is None else config, "config")
    runtime = runtime_config
    if runtime is not None:
        runtime = RuntimeConfig.given(runtime, "runtime_config")
        _require_dtype(model, runtime.dtype)
        settled = config.resolve(runtime)  # what is captured is settled by capture()
        config = config.replace(
            compile_sizes=settled.compile_sizes,
            compile_ranges_endpoints=settled.compile_ranges_endpoints,
        )
    if config.pass_config.fuse_attn_quant and splitting_ops is None:
        config = config.set_splitting_ops_for_v1(registry.names())
    named = example_kwargs is None or isinstance(example_kwargs, Mapping)
    if not isinstance(example_args, (tuple, list)) or not named:
        raise errors.ConfigError(
            "example_args is a tuple, one item an argument, and example_kwargs a dict of arguments",
            where="example_args",
            hint="a single argument x is passed as (x,)",
        )
    made: StitchedModule
    if config.mode in _UNSTITCHED:
        made = UnstitchedModule(model, config)
    else:
        if config.mode is CompilationMode.DYNAMO_TRACE_ONCE:
            declared = config.splitting_ops if splitting_ops is None else splitting_ops
            if declared and not config.use_inductor_graph_partition:
                why = f"mode {config.mode} compiles the graph whole, and there are splitting ops"
                hint = "use PIECEWORK_COMPILE to cut there, or leave splitting_ops out"
                raise errors.ConfigError(why, where="splitting_ops", hint=hint)
            splitting_ops = splitting_ops or ()
        made = StitchedModule(
            # What torch.compile made of a model can't be traced; the model can.
            torch_compat.original_of(model),
            splitting_ops=splitting_ops,
            config=config,
            sizes=sizes,
            around=around,
            runtime_config=runtime,
            as_it_is=as_it_is,
            kept=kept,
        )
        if not deferred:
            made.backend.require_compiler()
    if example_args or example_kwargs:
        made.prepare(*example_args, **(example_kwargs or {}))
    return made


def _require_dtype(model: Callable[..., object], name: str) -> None:
    """Refuse a dtype that none of the model's floating weights has."""
    held = model.state_dict().values() if name and isinstance(model, torch.nn.Module) else ()
    floating = (t.dtype for t in held if isinstance(t, torch.Tensor) and t.is_floating_point())
    found = sorted(set(map(str, floating)))
    if found and f"torch.{name}" not in found:
        why = f"the program's dtype is {name}, and the model's weights are {', '.join(found)}"
        hint = "load the model as that, or leave dtype out"
        raise errors.ConfigError(why, where="dtype", hint=hint)


class UnstitchedModule(StitchedModule):
    """A model in a mode that stitches nothing: as it is, or as ``torch.compile`` has it."""

    def __init__(self, model: Callable[..., object], config: CompilationConfig) -> None:
        super().__init__(model)  # its backend stays empty
        vars(self)["config"] = config
        is_stock = config.mode is CompilationMode.STOCK_TORCH_COMPILE
        self._serve_by(self._compile_and_call if is_stock else model)

    def prepare(self, *args: object, **kwargs: object) -> None:
        """Nothing is made ahead: torch compiles at the first call."""

    def rebind(self) -> None:
        """Nothing is bound: the model's weights are read at each call."""

    def _compile_and_call(self, *args: object, **kwargs: object) -> object:
        """The first call of torch's own compilation."""
        if self._switched_off():
            return self.model(*args, **kwargs)
        config = self.config
        options = dict(config.inductor_compile_config) if config.backend == "inductor" else {}
        # Dynamo caches by code object; one of its own keeps models independent of each other.
        own = types.FunctionType(_call_model.__code__.replace(), _call_model.__globals__)
        backend = config.init_backend()
        stock = torch.compile(own, backend=backend, dynamic=True, options=options or None)
        compiled = partial(stock, self.model)
        result = compiled(*args, **kwargs)
        self._serve_by(compiled)
        compilation_complete()
        return result

    def _missing(self, what: str) -> errors.NotThereError:
        why = f"mode {self.config.mode} stitches nothing, so there is no {what}"
        hint = "use DYNAMO_TRACE_ONCE or PIECEWORK_COMPILE"
        return errors.NotThereError(why, where="mode", hint=hint)

    def _summary(self) -> str:
        return f"{type(self.model).__name__}, mode {self.config.mode}: not stitched"


def _call_model(model, *args, **kwargs):  # type: ignore[no-untyped-def]
    return model(*args, **kwargs)
