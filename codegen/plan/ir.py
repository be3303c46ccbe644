"""The statements and expressions that emitted source is made of. In: nothing; this is the vocabulary between `lower` and `render`.

Nothing here knows torch or text: a value of these classes is a plan of the source, checked by `check_ir` and written by `render`.
All classes are frozen, hold no back-pointers and have no behaviour; `match` over `Expr` and `Stmt` is exhaustive.
"""

from __future__ import annotations

from dataclasses import dataclass

# --- expressions ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Name:
    """A local value: a parameter or the target of an earlier statement."""

    id: str


@dataclass(frozen=True, slots=True)
class Literal:
    """A Python literal whose exact type may be written inline (see `consts.is_inline_literal`)."""

    value: object


@dataclass(frozen=True, slots=True)
class Const:
    """An entry of ``__vllm_consts__``."""

    index: int


@dataclass(frozen=True, slots=True)
class Global:
    """A dotted path from an import, an alias or a builtin, such as ``torch.ops.aten.add.Tensor``."""

    path: str


@dataclass(frozen=True, slots=True)
class ListExpr:
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class TupleExpr:
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class DictExpr:
    items: tuple[tuple[Expr, Expr], ...]


@dataclass(frozen=True, slots=True)
class SliceExpr:
    start: Expr
    stop: Expr
    step: Expr


@dataclass(frozen=True, slots=True)
class SetExpr:
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Attribute:
    """``value.name``."""

    value: Expr
    name: str


@dataclass(frozen=True, slots=True)
class Item:
    """``value[index]``."""

    value: Expr
    index: Expr


@dataclass(frozen=True, slots=True)
class Operation:
    """Operands with a sign before or between them, all of one kind: ``-x``, ``x + y``, ``0 <= x <= 9``, ``x and y and z``.

    ``if`` has three operands, in the order in which they are written: ``x if test else y``.
    """

    sign: str
    operands: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """``function(arguments)``; a container of another type than the builtin ones (a namedtuple) is rebuilt from its fields so."""

    function: Expr
    arguments: Arguments


@dataclass(frozen=True, slots=True)
class Star:
    """``*value`` or ``**value`` as an argument."""

    stars: str
    value: Expr


Expr = (
    Name
    | Literal
    | Const
    | Global
    | ListExpr
    | TupleExpr
    | SetExpr
    | DictExpr
    | SliceExpr
    | Attribute
    | Item
    | Operation
    | Call
    | Star
)


@dataclass(frozen=True, slots=True)
class Arguments:
    args: tuple[Expr, ...] = ()
    kwargs: tuple[tuple[str, Expr], ...] = ()


# --- where a statement comes from ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origin:
    """What a statement stands for: the FX node, the module path, the place of the user's source line, and what stands there.

    ``module`` is one path, or ``first … last`` for a piece that spans several modules; ``code`` is "" where it takes several lines.
    """

    node: str = ""
    module: str = ""
    source: str = ""
    shapes: str = ""
    code: str = ""


# --- statements ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallSubmod:
    """``targets = __vllm_submods__[index](arguments)``; several targets unpack the result."""

    targets: tuple[str, ...]
    unpack: bool
    index: int
    arguments: Arguments
    origin: Origin


@dataclass(frozen=True, slots=True)
class CallInlined:
    """A call of another function of the emitted module."""

    targets: tuple[str, ...]
    unpack: bool
    function: str
    arguments: Arguments
    passes_submods: bool
    origin: Origin


@dataclass(frozen=True, slots=True)
class Assign:
    """``targets = value``; several targets unpack it, and without any it is only evaluated."""

    targets: tuple[str, ...]
    unpack: bool
    value: Expr
    origin: Origin = Origin()


@dataclass(frozen=True, slots=True)
class If:
    """``if test:``; nothing is bound inside, so that a name is bound in either case or not at all."""

    test: Expr
    body: tuple[Stmt, ...]
    origin: Origin = Origin()


@dataclass(frozen=True, slots=True)
class With:
    """``with context:``."""

    context: Expr
    body: tuple[Stmt, ...]
    origin: Origin = Origin()


@dataclass(frozen=True, slots=True)
class Try:
    """``try:``, after the statement that opens a region; what follows, up to its `Finally`, is inside."""


@dataclass(frozen=True, slots=True)
class Finally:
    """``finally: call``, which closes the region that the last open `Try` began."""

    call: Assign


@dataclass(frozen=True, slots=True)
class Delete:
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Return:
    value: Expr
    origin: Origin = Origin()


Stmt = Assign | CallSubmod | CallInlined | If | With | Try | Finally | Delete | Return

# --- functions and the module --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parameter:
    """``kind`` is ``""``, ``"/"`` for positional only, ``"k"`` for keyword only, ``"*"`` or ``"**"``; ``default`` is None when there is none."""

    name: str
    kind: str = ""
    default: Expr | None = None


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    parameters: tuple[Parameter, ...]
    body: tuple[Stmt, ...]
    takes_submods: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Alias:
    """A module-level name for something called from many statements."""

    name: str
    value: Expr
    note: str = ""


@dataclass(frozen=True, slots=True)
class ConstSpec:
    """One row of the consts table: what ``__vllm_consts__[index]`` is.

    ``attribute`` is the dotted path in `split_gm` when the constant was read from an attribute.
    """

    index: int
    description: str
    attribute: str | None = None


@dataclass(frozen=True, slots=True)
class BoundName:
    """A placeholder that is held as a module-level name instead of passed per call."""

    name: str
    path: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Module:
    """The whole emitted module. ``functions`` are in order of definition; ``entry`` comes last; ``provided`` are names that the
    runtime puts into it; ``digests`` say what each of ``submod_names`` computes, "" where that is not known.
    """

    imports: tuple[str, ...]
    aliases: tuple[Alias, ...]
    functions: tuple[Function, ...]
    entry: Function
    submod_names: tuple[str, ...]
    const_specs: tuple[ConstSpec, ...]
    bound: tuple[BoundName, ...] = ()
    banner: tuple[str, ...] = ()
    provided: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
