"""What makes two Python values the same: equal content has one identity in every process, and different behaviour never shares one."""

from __future__ import annotations

import collections
import enum
import importlib
import json
import math
import re
import sys
import threading
import types
from pathlib import Path

import pytest
from processes import python

from piecework.errors import Unidentifiable
from piecework.runtime.store.digest import canonical, text_of


def identity(value: object) -> str:
    return text_of(canonical(value, "test"))


def assert_all_differ(values: list[object]) -> None:
    found = {identity(each): each for each in values}
    assert len(found) == len(values)


# --- data --------------------------------------------------------------------------------------------


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Other(enum.Enum):
    LOW = 1
    HIGH = 2


class Text(str):
    __slots__ = ()


class Words(enum.StrEnum):
    HIGH = "high"


Pair = collections.namedtuple("Pair", "x y")


def test_values_that_python_takes_for_equal_are_told_apart() -> None:
    assert_all_differ([True, 1, 1.0, 1 + 0j, "1", b"1", Level.LOW, Other.LOW])
    assert_all_differ([0.0, -0.0, 0, False, None, "", b"", (), [], {}, set(), frozenset(), "None"])
    assert_all_differ([math.nan, math.inf, -math.inf, "nan", "Infinity"])
    assert_all_differ(
        [{1: "a"}, {"1": "a"}, {1.0: "a"}, {True: "a"}, {"a": 1}, [(1, "a")], [[1, "a"]]]
    )
    assert_all_differ(
        [(1, 2), [1, 2], {1, 2}, frozenset({1, 2}), range(1, 3), Pair(1, 2), slice(1, 2)]
    )
    assert_all_differ([{"a": 1, "b": 2}, {"b": 2, "a": 1}])  # who iterates over it sees the order
    assert_all_differ([{"a": 1}, collections.OrderedDict(a=1), collections.defaultdict(int, a=1)])
    assert_all_differ(["high", Text("high"), Words.HIGH, Level.HIGH, "HIGH", "Level.HIGH"])
    assert_all_differ([10**30, str(10**30), 2**63, -(2**63)])
    assert_all_differ([{"set": []}, set(), {"float": "nan"}, {"seen": 0}, {"list": []}, []])
    assert_all_differ([re.compile("a"), re.compile("a", re.I), re.compile(b"a"), "a", Path("a")])
    one = [1]
    assert_all_differ(
        [[one, one], [one, [1]]]
    )  # appending to the first changes the second, or does not


def test_a_container_that_holds_itself_has_an_identity() -> None:
    def ring(size: int) -> list[object]:
        first: list[object] = []
        last = first
        for _ in range(size):
            last.append([])
            last = last[0]  # type: ignore[assignment]
        last.append(first)
        return first

    assert identity(ring(2)) == identity(ring(2)) != identity(ring(3))


# --- code --------------------------------------------------------------------------------------------

TEXT = """
import enum
LIMITS = (1, 2)
RATE = 1
class Level(enum.Enum):
    LOW, HIGH = 1, 4
class Base:
    def step(self):
        return RATE
class Pass(Base):
    table = {1: b'a'}
    def __init__(self, level):
        self.level = level
    def __call__(self, graph, by=5, *, also=6):
        def inner():
            return [each for each in LIMITS]
        return inner(), self.step(), helper(graph), helper.limit
def helper(x):
    return deeper(x) * 2
helper.limit = 7
def deeper(x):
    return x + 3
"""
#: What is edited in the text, and whether the pass is another one then.
EDITS = [
    ("(1, 2)", "(1, 3)", True),
    ("RATE = 1", "RATE = True", True),
    ("1, 4", "1, 5", True),
    ("return RATE", "return -RATE", True),
    ("b'a'", "b'b'", True),
    ("by=5", "by=6", True),
    ("also=6", "also='6'", True),
    ("x + 3", "x - 3", True),
    ("limit = 7", "limit = 8", True),
    ("import enum", "import enum  # a comment", False),
    ("import enum", "import enum\nUNRELATED = 1", False),
]


def load(folder: Path, text: str = TEXT) -> types.ModuleType:
    """A module of the text, as it would be imported in a new process."""
    folder.mkdir(parents=True)
    (folder / "template.py").write_text(text)
    sys.modules.pop("template", None)
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("template")
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize(("before", "after", "changes"), EDITS)
def test_an_edit_changes_the_identity_of_what_reaches_it(
    tmp_path: Path, before: str, after: str, changes: bool
) -> None:
    assert before in TEXT
    texts = {"base": TEXT, "moved": TEXT, "edited": TEXT.replace(before, after)}
    modules = [load(tmp_path / name, text) for name, text in texts.items()]
    base, moved, edited = (identity(each.Pass(each.Level.HIGH)) for each in modules)
    assert base == moved and (edited != base) is changes


IN_A_PROCESS = """
import template
from piecework.runtime.store.digest import digest_of
values = [template.Pass(template.Level.HIGH), template.helper, {"a", "b", (1, 2.5), frozenset({"x", "y"})}, template.Level]
print([digest_of(each, "x") for each in values])
"""


def test_every_process_and_hash_seed_has_the_same_identity(tmp_path: Path) -> None:
    found = []
    for seed in ("0", "1"):
        folder = tmp_path / seed
        load(folder)
        seeds = {"PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": seed}
        found.append(python("-c", IN_A_PROCESS, cwd=folder, **seeds).stdout)
        (folder / "template.py").touch()
    assert found[0] == found[1]


def test_classes_made_by_one_function_count_by_what_they_hold() -> None:
    def make(value: object) -> type:
        class Made:
            setting = value

            def run(self) -> object:
                return value

        return Made

    assert identity(make(1)) == identity(make(1)) != identity(make(True))
    assert identity(make(1)()) != identity(make(2)())


this_module = sys.modules[__name__]


@pytest.mark.parametrize(
    "value",
    [
        object(),
        threading.Lock(),
        (i for i in ()),
        this_module,
        [object()],
        {1: threading.Lock()},
        types.SimpleNamespace(x=object()),
        memoryview(b""),
    ],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_what_is_not_known_has_no_identity(value: object) -> None:
    with pytest.raises(Unidentifiable) as caught:
        identity(value)
    assert caught.value.where == "test" and caught.value.hint


def test_an_object_speaks_for_itself_with_a_uuid() -> None:
    class Named:
        def __init__(self, name: object) -> None:
            self.name, self.lock = name, threading.Lock()

        def uuid(self) -> object:
            return self.name

    assert identity(Named("a")) == identity(Named("a"))
    assert_all_differ([Named("a"), Named("b"), Named(b"a"), "a"])
    with pytest.raises(Unidentifiable, match="None"):
        identity(Named(None))


def test_functions_of_libraries_count_by_name_and_other_modules_are_not_looked_through() -> None:
    assert "python" in identity(math.floor) and "json" in identity(json.dumps)

    def reads() -> object:
        return this_module

    def imports() -> object:
        import small_llms

        return small_llms

    for each in (reads, imports):
        with pytest.raises(Unidentifiable, match="in no installed library"):
            identity(each)
