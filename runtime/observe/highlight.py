"""Python text in colour. In: a text. Out: what each of its characters is, and lines as safe HTML with a class per kind of token.

Every character is escaped; which colour a class has is the page's business.
"""

from __future__ import annotations

import builtins
import io
import keyword
import tokenize
from collections.abc import Collection

from markupsafe import Markup, escape

_BUILTINS = frozenset(dir(builtins))

Styles = list[str]  # for each character of a line, the class of its token


def token_styles(text: str) -> list[Styles]:
    """For each line, the class of each of its characters: k(eyword), s(tring), c(omment), n(umber), b(uiltin) or ""."""
    lines = text.splitlines()
    styles: list[Styles] = [[""] * len(line) for line in lines]
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return styles  # an edited file that is not Python is shown without colours
    for token in tokens:
        style = _style(token)
        if not style:
            continue
        (first, start), (last, end) = token.start, token.end
        for number in range(first - 1, min(last, len(lines))):
            low = start if number == first - 1 else 0
            high = end if number == last - 1 else len(lines[number])
            for column in range(low, min(high, len(lines[number]))):
                styles[number][column] = style
    return styles


def _style(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.COMMENT:
        return "c"
    if token.type == tokenize.STRING:
        return "s"
    if token.type == tokenize.NUMBER:
        return "n"
    if token.type == tokenize.NAME:
        if keyword.iskeyword(token.string):
            return "k"
        return "v" if token.string.startswith("__vllm_") else "b" * (token.string in _BUILTINS)
    return ""


def line_html(line: str, styles: Styles, marks: Collection[int] = ()) -> Markup:
    """``line`` as HTML: one element per run of equally styled characters; the columns in ``marks`` are marked."""
    parts: list[Markup] = []
    start = 0
    for column in range(1, len(line) + 1):
        if column < len(line) and (styles[column], column in marks) == (
            styles[start],
            start in marks,
        ):
            continue
        text = escape(line[start:column])
        inner = (
            Markup('<span class="{}">{}</span>').format(styles[start], text)
            if styles[start]
            else text
        )
        parts.append(Markup("<mark>{}</mark>").format(inner) if start in marks else inner)
        start = column
    return Markup("").join(parts)
