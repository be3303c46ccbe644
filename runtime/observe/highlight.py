"""Python text in colour, as safe HTML with a class per kind of token; the page says what colour a class has."""

from __future__ import annotations

from collections.abc import Collection

from markupsafe import Markup, escape
from pygments.lexers.python import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String, _TokenType

Styles = list[str]  # for each character of a line, the class of its token
_CLASSES = (
    (Comment, "c"),
    (String, "s"),
    (Number, "n"),
    (Keyword, "k"),
    (Operator.Word, "k"),
    (Name.Builtin, "b"),
)


def token_styles(text: str) -> list[Styles]:
    """For each line, the class of each of its characters: c, s, n, k, b, v (a table) or ""."""
    styles: list[Styles] = [[""] * len(line) for line in text.splitlines()]
    line = column = 0
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text):
        style = _style(kind, value)
        for character in value:
            if character == "\n":
                line, column = line + 1, 0
                continue
            if line < len(styles) and column < len(styles[line]):
                styles[line][column] = style
            column += 1
    return styles


def _style(kind: _TokenType, value: str) -> str:
    if value.startswith("__vllm_"):
        return "v"
    return next((name for each, name in _CLASSES if kind in each), "")


def line_html(line: str, styles: Styles, marks: Collection[int] = ()) -> Markup:
    """``line`` with an element per run of equal styles; the columns in ``marks`` are marked."""
    parts: list[Markup] = []
    looks = [(style, at in marks) for at, style in enumerate(styles)]
    start = 0
    for column in range(1, len(line) + 1):
        if column < len(line) and looks[column] == looks[start]:
            continue
        style, marked = looks[start]
        part = escape(line[start:column])
        part = Markup('<span class="{}">{}</span>').format(style, part) if style else part
        parts.append(Markup("<mark>{}</mark>").format(part) if marked else part)
        start = column
    return Markup("").join(parts)
