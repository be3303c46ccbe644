"""Names that a scope gives out: valid, free, and the same ones every time."""

from __future__ import annotations

import builtins
import keyword

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.codegen.plan.names import NameTable, is_identifier


@given(
    st.lists(
        st.text(max_size=10)
        | st.sampled_from(["x", "x_1", "_", "__", "torch", "len", "if", "é", "__a"]),
        max_size=30,
    )
)
@settings(max_examples=300, deadline=None)
def test_every_wish_gets_a_valid_name_of_its_own(wishes: list[str]) -> None:
    table = NameTable(frozenset({"torch", "operator"}))
    names = [table.claim(wish) for wish in wishes]
    assert len(set(names)) == len(names)
    for name in names:
        assert is_identifier(name) and not name.startswith("__")
        assert name not in ("torch", "operator") and not hasattr(builtins, name)
    again = NameTable(frozenset({"torch", "operator"}))
    assert [again.claim(wish) for wish in wishes] == names


@pytest.mark.parametrize(
    ("wish", "name"),
    [("x", "x"), ("a.b", "a_b"), ("1x", "v_1x"), ("", "v_"), ("lambda", "v_lambda"), ("len", "len_1"), ("é", "value"),
     ("__x__", "x__"), ("__class", "v_class"), ("_", "value"), ("match", "match"), ("a." + "b" * 200, "a_" + "b" * 78)],
)  # fmt: skip
def test_names_stay_close_to_the_wish(wish: str, name: str) -> None:
    assert NameTable().claim(wish) == name or wish in ("", "é")


def test_a_taken_name_gets_the_next_number() -> None:
    table = NameTable()
    names = [table.claim(name) for name in ("x", "x_1", "x", "x", "x_1")]
    assert names == ["x", "x_1", "x_2", "x_3", "x_1_1"]


def test_an_identifier_is_ascii_and_no_keyword() -> None:
    assert is_identifier("x_1") and not any(map(is_identifier, keyword.kwlist))
    assert not is_identifier("__debug__"), "f(__debug__=1) is no Python"
    assert not any(map(is_identifier, ("é", "", 3, "a b")))
