"""Deletes each value after the statement that uses it last.

Parameters are borrowed from the caller and never deleted; a name that is returned is never deleted either.
"""

from __future__ import annotations

from piecework.codegen.plan.ir import Statement


def deletion(names: tuple[str, ...]) -> Statement:
    return Statement(f"del {', '.join(names)}", "del", names)


def insert_deletes(body: tuple[Statement, ...], borrowed: frozenset[str]) -> tuple[Statement, ...]:
    """Return ``body`` with a ``del`` after the last use of every name outside ``borrowed``."""
    last: dict[str, int] = {}
    kept = set(borrowed)
    for index, stmt in enumerate(body):
        last.update(dict.fromkeys((*stmt.targets, *stmt.uses), index))
        kept.update(stmt.uses if stmt.kind == "return" else ())
    dying: dict[int, list[str]] = {}
    for stmt in body:  # order of definition, so that the text is stable
        for name in stmt.targets:
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
