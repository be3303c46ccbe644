"""What a module of emitted source is made of; statements are text, with what is asked of them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from piecework.errors import short_methods


@dataclass(frozen=True, slots=True)
class Origin:
    """What a statement stands for."""

    module: str = ""  # one path, or ``first … last`` for a piece that spans several modules
    source: str = ""  # the place of the user's source line
    shapes: str = ""  # of results
    code: str = ""  # what stands in that line; "" where it takes several


@dataclass(frozen=True, slots=True)
class PieceCall:
    """The call of a submodule."""

    index: int  # in ``__vllm_submods__``
    arguments: str
    # the leaves of the arguments, in order; None where one is a dict, a slice or named
    leaves: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement."""

    text: str  # on one line; the statements of a block are below it
    # ``try`` begins a region that ``finally`` ends; ``nested`` calls a function that calls pieces
    # itself
    kind: Literal["", "nested", "del", "return", "try", "finally"] = ""
    # the names that it binds or deletes; ``unpack`` tells one element from the whole result
    targets: tuple[str, ...] = ()
    unpack: bool = False
    uses: tuple[str, ...] = ()  # the local names that it reads
    origin: Origin = Origin()
    piece: PieceCall | None = None  # the call that it consists of, if it is one of a submodule


@dataclass(frozen=True, slots=True)
class Parameter:
    """``kind`` is ``""``, ``"/"`` positional only, ``"k"`` keyword only, ``"*"`` or ``"**"``."""

    name: str
    kind: str = ""
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    parameters: tuple[Parameter, ...]
    body: tuple[Statement, ...]
    takes_submods: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Alias:
    """A module-level name for something called from many statements."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class ConstSpec:
    """What ``__vllm_consts__[index]`` is."""

    index: int
    description: str
    attribute: str | None = None  # where `split_gm` has it


@dataclass(frozen=True, slots=True)
class BoundName:
    """A placeholder that is held as a module-level name instead of passed per call."""

    name: str
    path: str
    description: str
    placeholder: str


@dataclass(frozen=True, slots=True)
class Module:
    """The whole emitted module."""

    imports: tuple[str, ...]
    entry: Function
    functions: tuple[Function, ...] = ()
    aliases: tuple[Alias, ...] = ()
    submod_names: tuple[str, ...] = ()
    const_specs: tuple[ConstSpec, ...] = ()
    bound: tuple[BoundName, ...] = ()
    banner: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()  # what each submodule computes, "" if not known


@short_methods
@dataclass(frozen=True, slots=True)
class LowerOptions:
    """What may differ between two emissions of one graph."""

    # names of submodules to call through ``__vllm_submods__``; None means every submodule that is
    # not a plain GraphModule (those are inlined)
    submods: Collection[str] | None = None
    # placeholder name → path of the weight, for placeholders held as module-level names
    bound: Mapping[str, str] = field(default_factory=dict)
    # operator → callable to use in its place (a splitting op's own implementation)
    direct: Mapping[object, Callable[..., object]] = field(default_factory=dict)
    emit_del: bool = True  # write ``del`` after each last use
    banner: tuple[str, ...] = ()  # lines of the header comment
    # name of a submodule → a short digest of what it computes, for the header
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved equal: the number of events (calls), and of the text's statements."""

    events: int
    statements: int


def deletion(names: tuple[str, ...]) -> Statement:
    return Statement(f"del {', '.join(names)}", "del", names)


def insert_deletes(body: tuple[Statement, ...], borrowed: frozenset[str]) -> tuple[Statement, ...]:
    """``body`` with a ``del`` after the last use of every name outside ``borrowed``."""
    last: dict[str, int] = {}
    kept = set(borrowed)
    for index, stmt in enumerate(body):
        last.update(dict.fromkeys((*stmt.targets, *stmt.uses), index))
        kept.update(stmt.uses if stmt.kind == "return" else ())
    dying: dict[int, list[str]] = {}
    for name in dict.fromkeys(name for stmt in body for name in stmt.targets):
        if name not in kept:
            dying.setdefault(last[name], []).append(name)
    out: list[Statement] = []
    for index, stmt in enumerate(body):
        out.append(stmt)
        opens = index + 1 < len(body) and body[index + 1].kind == "try"
        after = index - 1 if stmt.kind == "try" else index  # nothing stands before a `try`
        if after in dying and not opens:
            out.append(deletion(tuple(dying[after])))
    return tuple(out)
