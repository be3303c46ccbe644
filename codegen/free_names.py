"""Names that emitted text reads and nothing defines. In: an emitted module and the names that the runtime provides. Out: nothing, or an `EmitError`.

Python's own symbol tables say which names are global to a function; nothing is executed. A name that is missing is found when
the text is made, not when it is called.
"""

from __future__ import annotations

import symtable
from collections.abc import Iterable, Iterator

from piecework.codegen.names import BUILTINS
from piecework.errors import EmitError


def require_names(code: str, provided: Iterable[str], what: str) -> None:
    """Check that every name that ``code`` reads is bound by it, provided, or a builtin.

    Raises:
        EmitError: one is not; names it.
    """
    table = symtable.symtable(code, "<emitted>", "exec")
    defined = set(provided) | {s.get_name() for s in table.get_symbols() if _is_bound(s)}
    for name in _read_globally(table):
        if name not in defined and name not in BUILTINS:
            raise EmitError(
                f"{what} reads the name {name!a}, which nothing defines",
                hint="please report this with the model that was compiled",
            )


def _is_bound(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()


def _read_globally(table: symtable.SymbolTable) -> Iterator[str]:
    """Names that are looked up in the module, or among the builtins."""
    at_module = table.get_type() == "module"
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (at_module or symbol.is_global()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _read_globally(child)
