"""The compilers of pieces, and the one that a configuration's ``backend`` names."""

from piecework.errors import ConfigError
from piecework.runtime.compilers.inductor import InductorAdaptor, InductorStandaloneAdaptor
from piecework.runtime.compilers.interface import CompiledPiece as CompiledPiece
from piecework.runtime.compilers.interface import CompilerInterface as CompilerInterface
from piecework.runtime.compilers.interface import DynamoBackendAdaptor, EagerAdaptor
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.groups import CompilationMode
from piecework.runtime.config.model import import_qualified


def make_compiler(config: CompilationConfig) -> CompilerInterface:
    """The compiler that ``config.backend`` names, which has all methods of `CompilerInterface`."""
    name = config.backend
    match name:
        case "inductor":
            return InductorStandaloneAdaptor(config)
        case "inductor_compile_fx":
            return InductorAdaptor(config)
        case "eager":
            return EagerAdaptor()
    traced_whole = config.mode is CompilationMode.DYNAMO_TRACE_ONCE
    if name.isidentifier():
        if traced_whole:
            return DynamoBackendAdaptor(config.init_backend())
        raise ConfigError(f"no compiler {name!a}", where="backend", hint=_CHOICES)
    found = import_qualified(name, where="backend")
    if traced_whole and not isinstance(found, type):
        return DynamoBackendAdaptor(found)
    try:
        compiler = found()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        message = f"compiler {name!a} can't be made without arguments: {why}"
        raise ConfigError(message, where="backend", hint=_CHOICES) from error
    wanted = ["compile", "compute_hash", "name"]
    if hasattr(compiler, "to_bytes") or hasattr(compiler, "from_bytes"):
        wanted += ["to_bytes", "from_bytes"]  # one is of no use without the other
    if missing := [each for each in wanted if getattr(compiler, each, None) is None]:
        message = f"compiler {name!a} has no {', '.join(missing)}"
        hint = "see piecework.runtime.compilers.CompilerInterface"
        raise ConfigError(message, where="backend", hint=hint)
    return compiler  # type: ignore[no-any-return]


_CHOICES = (
    "use inductor, inductor_compile_fx, eager, or a qualified name such as mypackage:MyCompiler"
)
