"""The statements and expressions that emitted source is made of. In: nothing; this is the vocabulary between `lower` and `render`.

Nothing here knows torch or text: a value of these classes is a plan of the source, checked by `check_ir` and written by `render`.
All classes are frozen, hold no back-pointers and have no behaviour; `match` over `Expr` and `Stmt` is exhaustive.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
class Construct:
    """A container of another type than the builtin ones (a namedtuple), rebuilt from its fields."""

    type: Expr
    items: tuple[Expr, ...]


Expr = Name | Literal | Const | Global | ListExpr | TupleExpr | DictExpr | SliceExpr | Construct

# --- where a statement comes from ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origin:
    """What a statement stands for: the FX node, the module path and the user's source line.

    ``module`` is one path, or ``first … last`` for a piece that spans several modules.
    """

    node: str = ""
    module: str = ""
    source: str = ""
    shapes: str = ""


# --- statements ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arguments:
    args: tuple[Expr, ...] = ()
    kwargs: tuple[tuple[str, Expr], ...] = ()


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
class CallFunction:
    targets: tuple[str, ...]
    unpack: bool
    function: Expr
    arguments: Arguments
    origin: Origin


@dataclass(frozen=True, slots=True)
class CallMethod:
    targets: tuple[str, ...]
    unpack: bool
    receiver: Expr
    method: str
    arguments: Arguments
    origin: Origin


@dataclass(frozen=True, slots=True)
class GetItem:
    """``target = value[index]``."""

    target: str | None
    value: Expr
    index: Expr
    origin: Origin


@dataclass(frozen=True, slots=True)
class GetAttr:
    """``target = value.attribute``."""

    target: str | None
    value: Expr
    attribute: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Infix:
    """``target = left op right``; ``left`` is None for a prefix operator."""

    target: str | None
    operator: str
    left: Expr | None
    right: Expr
    origin: Origin


@dataclass(frozen=True, slots=True)
class Try:
    """``try:``, after the statement that opens a region; what follows, up to its `Finally`, is inside."""


@dataclass(frozen=True, slots=True)
class Finally:
    """``finally: call``, which closes the region that the last open `Try` began."""

    call: CallFunction


@dataclass(frozen=True, slots=True)
class Delete:
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Return:
    value: Expr
    origin: Origin


Stmt = (
    CallSubmod
    | CallInlined
    | CallFunction
    | CallMethod
    | GetItem
    | GetAttr
    | Infix
    | Try
    | Finally
    | Delete
    | Return
)

# --- functions and the module --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parameter:
    """``prefix`` is ``""``, ``"*"`` or ``"**"``; ``default`` is None when there is none."""

    name: str
    prefix: str = ""
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
    """The whole emitted module. ``functions`` are in order of definition; ``entry`` comes last."""

    imports: tuple[str, ...]
    aliases: tuple[Alias, ...]
    functions: tuple[Function, ...]
    entry: Function
    submod_names: tuple[str, ...]
    const_specs: tuple[ConstSpec, ...]
    bound: tuple[BoundName, ...] = ()
    banner: tuple[str, ...] = field(default=())
