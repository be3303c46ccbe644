"""Proof that the text of an entry says what its plan says. In: the text, its constants and the `EntryPlan`. Out: nothing, or an `EmitError` that names the line.

The text is read by `entry_text`, which knows nothing of how it was made; what it has to say is told here once more, kind by kind, and
must be there statement by statement: each check in its order and none weaker, each argument, each result, and nothing else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import assert_never

import torch

from piecework.codegen import checks
from piecework.codegen.entry_plan import (
    EntryPlan,
    FromCall,
    FromConst,
    FromItems,
    FromLeaf,
    FromNumber,
    FromOffset,
    FromOutput,
    FromSize,
    FromSymbol,
    FromWeights,
    Packed,
    Passed,
    Size,
)
from piecework.codegen.entry_text import (
    Form,
    ReadFunction,
    ReadModule,
    all_of,
    constant,
    line_at,
    read_entry,
    read_expression,
)
from piecework.codegen.literals import is_inline_literal
from piecework.codegen.size_text import MODULES, checked_text
from piecework.errors import EmitError

_MODES = "autocast_enabled() or dispatch_modes() or function_modes() or transforms() or not same_kernels()"
_VALUE = "__value__"  # no symbol's name


def prove_entry(
    code: str, plan: EntryPlan, provided: Sequence[str], consts: Mapping[str, object]
) -> None:
    """Check that ``code`` is the entry of ``plan``: no check left out, changed, weakened or moved, nothing passed or returned but what the plan says.

    Args:
        provided: names that the runtime puts into the module.
        consts: names and values that come with the text.

    Raises:
        EmitError: it is not; names the line.
    """
    _Proof(code, plan, read_entry(code, provided, consts)).run()


@dataclass(slots=True)
class _Scope:
    """What the values of a call are inside one function.

    Attributes:
        leaves: flattened argument → its form.
        symbols: symbol → its form.
        trees: what was flattened → the statement that did it.
        dims: an argument and a dimension → the form of a size that was taken.
        taken: forms that statements of ``check_inputs`` bound to arguments and symbols, in order.
        bound: how many statements bound something.
    """

    leaves: dict[int, Form] = field(default_factory=dict)
    symbols: dict[str, Form] = field(default_factory=dict)
    trees: dict[checks.Where, int] = field(default_factory=dict)
    dims: dict[tuple[int, int], Form] = field(default_factory=dict)
    taken: list[Form] = field(default_factory=list)
    bound: int = 0


class _Proof:
    def __init__(self, code: str, plan: EntryPlan, module: ReadModule) -> None:
        self.code = code
        self.plan = plan
        self.module = module
        self.scope = _Scope()
        self.parameters = tuple(("parameter", n) for n in range(len(plan.parameters)))

    def run(self) -> None:
        plan, module = self.plan, self.module
        kept = [
            step
            for step in checks.entry_table(plan)
            if plan.checks or not isinstance(step, checks.Require)
        ]
        body = [form for step in kept for form in self._step(step)]
        used = self._used()
        handed = [form for form in self.scope.taken if form in used]
        if handed:
            body.append(("return", handed[0] if len(handed) == 1 else ("Tuple", *handed)))
        self._imports(kept)
        expected = [body] if body else []
        expected.append(self._entry(handed, checked=bool(body)))
        if (
            len(module.functions) == len(expected) + 1
        ):  # one more has the model's names for its parameters
            named = [each.name for each in module.functions[-2].parameters]
            expected.append([("return", self._call(("function", len(expected) - 1), named))])
        if len(module.functions) != len(expected):
            raise EmitError(f"the text of the entry has {len(module.functions)} functions")
        for number, (function, forms) in enumerate(zip(module.functions, expected, strict=True)):
            (self._check_inputs if body and not number else self._defaults)(function)
            self._compare(function, forms)
        last = module.functions[-1]
        own = [each.name for each in plan.parameters]
        if [each.name for each in last.parameters] != own:
            raise self._error(last.line, "the entry has other parameters than the model")
        if module.names.get("entry") != ("function", len(expected) - 1):
            raise self._error(last.line, "the last function is not the entry")

    # --- what surrounds the statements -----------------------------------------------------------

    def _imports(self, steps: Sequence[checks.Step]) -> None:
        """``torch``, and the modules that relations call."""
        required = (c for s in steps if isinstance(s, checks.Require) for c in s.checks)
        texts = [text for check in required if (text := _expression_of(check))]
        names = {n.id for t in texts for n in ast.walk(ast.parse(t)) if isinstance(n, ast.Name)}
        needed = {"torch", *(names & MODULES.keys() - self.scope.symbols.keys())}
        if self.module.imports != tuple(sorted(needed)):
            raise EmitError(
                f"the entry's text imports {', '.join(self.module.imports) or 'nothing'}"
            )

    def _check_inputs(self, function: ReadFunction) -> None:
        kinds = [(each.kind, each.default) for each in function.parameters]
        if kinds != [("", None)] * len(self.parameters):
            raise self._error(
                function.line, "check_inputs does not take each parameter by position"
            )
        if self.module.names.get("check_inputs") != ("function", 0):
            raise self._error(function.line, "the checks are not called check_inputs")

    def _defaults(self, function: ReadFunction) -> None:
        found = [(each.kind, each.default) for each in function.parameters]
        for read, each in zip_longest(found, self.plan.parameters):
            default = None if each is None or each.default is None else constant(each.default.value)
            if each is None or read != (each.kind, default):
                raise self._error(function.line, "a parameter or its default is not the model's")

    def _compare(self, function: ReadFunction, expected: Sequence[Form]) -> None:
        line = function.line
        for read, form in zip_longest(function.body, expected):
            line = line if read is None else read[1]
            if read is None:
                raise self._error(line, "the text of the entry ends too early")
            if read[0] != form:
                raise self._error(line, "the text of the entry differs from its plan")

    def _error(self, line: int, why: str) -> EmitError:
        return EmitError(
            why,
            where=line_at(self.code, line),
            hint="please report this with the model that was compiled",
        )

    def _form(self, text: str, /, **holes: Form) -> Form:
        """The form of ``text``, in which ``holes`` stand for what they are given as."""
        return read_expression(text, holes, self.module.names)

    def _call(self, function: Form, keywords: Sequence[str]) -> Form:
        """The call of ``function`` with all parameters, as they are passed by users."""
        args: list[Form] = []
        named: list[tuple[str | None, Form]] = []
        for value, parameter, keyword in zip(
            self.parameters, self.plan.parameters, keywords, strict=True
        ):
            match parameter.kind:
                case "k":
                    named.append((keyword, value))
                case "*":
                    args.append(("star", value))
                case "**":
                    named.append((None, value))
                case _:
                    args.append(value)
        return "call", function, tuple(args), tuple(named)

    # --- check_inputs ----------------------------------------------------------------------------

    def _step(self, step: checks.Step) -> Iterator[Form]:
        scope = self.scope
        match step:
            case checks.Require(_, required):
                test = all_of([form for check in required for form in self._condition(check)])
                refused = "call", self._form("explain_inputs"), self.parameters, ()
                yield "if", ("Not", test), ("do", refused)
            case checks.TakeLeaf(leaf, _, where):
                scope.leaves[leaf] = value = self._value(where)
                if not isinstance(where, checks.Whole):
                    scope.leaves[leaf] = self._take(("bound", scope.bound))
                    yield self._bind("bind", value)
            case checks.TakeTree(where):
                scope.trees[where] = scope.bound
                yield self._bind("unpack", 2, self._form("flatten(X)", X=self._value(where)))
            case checks.TakeShape(leaf, symbols):
                for dim, symbol in enumerate(symbols):
                    scope.dims[leaf, dim] = size = ("bound", scope.bound, dim)
                    if symbol is not None:
                        scope.symbols[symbol] = self._take(size)
                yield self._bind(
                    "unpack", len(symbols), self._form("X.shape", X=scope.leaves[leaf])
                )
            case checks.TakeItem(leaf, symbol):
                scope.symbols[symbol] = self._take(("bound", scope.bound))
                yield self._bind("bind", self._form("X.item()", X=scope.leaves[leaf]))
            case checks.TakeInteger(leaf, symbol):
                scope.symbols[symbol] = scope.leaves[leaf]
            case _:
                assert_never(step)

    def _bind(self, *form: object) -> Form:
        self.scope.bound += 1
        return form

    def _take(self, form: Form) -> Form:
        self.scope.taken.append(form)
        return form

    def _value(self, where: checks.Where) -> Form:
        match where:
            case checks.Whole(parameter):
                return self.parameters[parameter]
            case checks.Part(of, key):
                return "item", self._value(of), constant(key)
            case checks.Flat(of, number):
                return "item", ("bound", self.scope.trees[of], 0), constant(number)
            case _:
                assert_never(where)

    def _condition(self, check: checks.Check) -> tuple[Form, ...]:
        if isinstance(check, checks.ContainerCheck):
            return tuple(self._container(check))
        if isinstance(check, checks.TensorCheck):
            return (self._tensor(check, self.scope.leaves[check.leaf]),)
        if isinstance(check, checks.NumberCheck):
            return (self._number(check, self.scope.leaves[check.leaf]),)
        if isinstance(check, checks.PythonCheck):
            return (self._python(check, self.scope.leaves[check.leaf]),)
        if isinstance(check, checks.SymbolCheck):
            return (self._symbol(check),)
        return (self._together(check),)

    def _container(self, check: checks.ContainerCheck) -> Iterator[Form]:
        value = self._value(check.where)
        match check:
            case checks.KindIs(kind=kind):
                yield self._form("type(X) is KIND", X=value, KIND=constant(kind))
            case checks.KeysAre(kind=kind, keys=keys):
                yield self._form("len(X) == COUNT", X=value, COUNT=constant(len(keys)))
                for key in keys if kind is dict else ():
                    yield self._form("KEY in X", KEY=constant(key), X=value)
            case checks.StructureIs(where=where, structure=structure):
                found = ("bound", self.scope.trees[where], 1)
                yield self._form("X == SPEC", X=found, SPEC=constant(structure))
            case _:
                assert_never(check)

    def _tensor(self, check: checks.TensorCheck, x: Form) -> Form:
        match check:
            case checks.ClassIs(kind=None):
                return self._form("type(X) is torch.Tensor or type(X) is torch.nn.Parameter", X=x)
            case checks.ClassIs(kind=kind):
                return self._form("type(X) is KIND", X=x, KIND=constant(kind))
            case checks.DtypeIs(dtype=dtype):
                return self._form("X.dtype is DTYPE", X=x, DTYPE=constant(dtype))
            case checks.Strided():
                return self._form("X.layout is torch.strided", X=x)
            case checks.DeviceIs(device=torch.device(type="cpu")):
                return self._form("X.is_cpu", X=x)
            case checks.DeviceIs(device=torch.device(type="cuda", index=index)):
                text = "X.is_cuda and X.get_device() == INDEX"
                return self._form(text, X=x, INDEX=constant(index or 0))
            case checks.DeviceIs(device=device):
                return self._form("X.device == torch.device(NAME)", X=x, NAME=constant(str(device)))
            case checks.RankIs(rank=rank):
                return self._form("X.dim() == RANK", X=x, RANK=constant(rank))
            case checks.Contiguous():
                return self._form("X.is_contiguous()", X=x)
            case checks.NotNegated():
                return self._form("not X.is_neg()", X=x)
            case checks.NotConjugated():
                return self._form("not X.is_conj()", X=x)
            case checks.GradIs(requires_grad=True):
                return self._form("X.requires_grad", X=x)
            case checks.GradIs():
                return self._form("not X.requires_grad", X=x)
            case checks.ShapeIs(sizes=sizes):
                return self._form("X.shape == SIZES", X=x, SIZES=("Tuple", *map(constant, sizes)))
            case _:
                assert_never(check)

    def _number(self, check: checks.NumberCheck, x: Form) -> Form:
        match check:
            case checks.SizeIs(leaf, dim, size):
                return self._equal(self.scope.dims[leaf, dim], size)
            case checks.StrideIs(dim=dim, size=size):
                return self._equal(self._form("X.stride(DIM)", X=x, DIM=constant(dim)), size)
            case checks.ItemIs(value=value):
                return self._equal(self._form("X.item()", X=x), value)
            case checks.IntegerIs(size=size):
                return self._equal(x, size)
            case _:
                assert_never(check)

    def _equal(self, x: Form, size: Size | float) -> Form:
        if isinstance(size, str):
            return self._relation(f"{_VALUE} == {size}", x)
        return self._form("X == NUMBER", X=x, NUMBER=constant(size))

    def _relation(self, text: str, x: Form = ()) -> Form:
        """A relation over symbols; it does not hold where it has no value."""
        return self._form(checked_text(text), **self.scope.symbols, **{_VALUE: x})

    def _python(self, check: checks.PythonCheck, x: Form) -> Form:
        match check:
            case checks.IsInteger():
                return self._form("type(X) is int", X=x)
            case checks.ValueIs(value=value):
                holes = {"X": x, "VALUE": constant(value), "KIND": constant(type(value))}
                if value is None or value is ... or type(value) is bool:
                    return self._form("X is VALUE", **holes)
                if type(value) is float and (value != value or value == 0):
                    text = constant(repr(value))
                    return self._form("type(X) is float and repr(X) == TEXT", X=x, TEXT=text)
                if is_inline_literal(value):
                    return self._form("type(X) is KIND and X == VALUE", **holes)
                return self._form("X is VALUE or type(X) is type(VALUE) and X == VALUE", **holes)
            case _:
                assert_never(check)

    def _symbol(self, check: checks.SymbolCheck) -> Form:
        match check:
            case checks.InRange(symbol, low, high):
                holes = {
                    "X": self.scope.symbols[symbol],
                    "LOW": constant(low),
                    "HIGH": constant(high),
                }
                if low is None:
                    return self._form("X <= HIGH", **holes)
                return self._form("X >= LOW" if high is None else "LOW <= X <= HIGH", **holes)
            case checks.Relation(text):
                return self._relation(text)
            case _:
                assert_never(check)

    def _together(self, check: checks.TogetherCheck) -> Form:
        leaves = self.scope.leaves
        match check:
            case checks.SameAs(leaf, other, _):
                return self._form("X is OTHER", X=leaves[leaf], OTHER=leaves[other])
            case checks.Distinct((one, other)):
                return self._form("X is not OTHER", X=leaves[one], OTHER=leaves[other])
            case checks.Distinct(every):
                numbers = ("Set", *(self._form("id(X)", X=leaves[leaf]) for leaf in every))
                return self._form("len(ALL) == COUNT", ALL=numbers, COUNT=constant(len(every)))
            case checks.Apart(leaf, others):
                args = tuple(leaves[each] for each in (leaf, *others))
                return "call", self._form("memory_apart"), args, ()
            case checks.AsTraced():
                return "call", self._form("arguments_as_traced"), self.parameters, ()
            case _:
                assert_never(check)

    # --- the entry -------------------------------------------------------------------------------

    def _used(self) -> set[Form]:
        """What the entry reads of what ``check_inputs`` bound."""
        plan = self.plan
        found = {
            self._origin(each) for each in (*plan.passed, *([plan.batch] if plan.batch else []))
        }
        return found | {self.scope.leaves[leaf] for leaf in _leaves_of(plan.result)}

    def _origin(self, passed: Passed) -> Form:
        match passed:
            case FromLeaf(leaf) | FromSize(leaf, _) | FromOffset(leaf):
                return self.scope.leaves[leaf]
            case FromSymbol(name):
                return self.scope.symbols[name]
            case FromNumber() | FromWeights():
                return ()
            case _:
                assert_never(passed)

    def _entry(self, handed: Sequence[Form], checked: bool) -> list[Form]:
        plan = self.plan
        forward = [each.name for each in plan.parameters]
        names = self.module.names
        again = self._call(names.get("entry", ()), forward)
        body: list[Form] = [
            ("if", self._form("dynamo._stance is not stance"),
             ("return", self._call(self._form("entry_in_stance"), forward))),
            ("if", self._form("torch.is_grad_enabled()"),
             ("with", self._form("torch.no_grad()"), ("return", again))),
            ("if", self._form(_MODES),
             ("return", self._call(self._form("entry_with_care"), forward))),
        ]  # fmt: skip
        bound = 0
        here: dict[Form, Form] = {each: each for each in self.parameters}
        if checked:
            call = "call", names.get("check_inputs", ()), self.parameters, ()
            if not handed:
                body.append(("do", call))
            elif len(handed) == 1:
                here[handed[0]] = ("bound", bound)
                body.append(("bind", call))
            else:
                here |= {form: ("bound", bound, place) for place, form in enumerate(handed)}
                body.append(("unpack", len(handed), call))
            bound += bool(handed)
        held, bound = bound, bound + 1
        body.append(("unpack", 3, self._form("bound")))
        if plan.binds and plan.checks:
            unbound = "do", self._form("explain_weights()")
            body.append(("if", self._form("not X()", X=("bound", held, 1)), unbound))
        weights: Form = ()
        if _reads_weights(plan):
            weights, bound = ("bound", bound), bound + 1
            body.append(("bind", self._form("X()", X=("bound", held, 2))))
        passed = tuple(self._passed(each, here, weights) for each in plan.passed)
        named: tuple[object, ...] = ()
        if plan.batch is not None:
            size = self._passed(plan.batch, here, weights)
            named = (("__vllm_submods__", self._form("submods_for(X)", X=size)),)
        run = "call", ("bound", held, 0), passed, named
        body.append(("unpack", len(plan.outputs), run) if plan.outputs else ("do", run))
        body.append(("return", self._packed(plan.result, here, weights, bound)))
        return body

    def _passed(self, value: Passed, here: Mapping[Form, Form], weights: Form) -> Form:
        match value:
            case FromLeaf() | FromSymbol():
                return here[self._origin(value)]
            case FromSize(dim=dim):
                return self._form("X.size(DIM)", X=here[self._origin(value)], DIM=constant(dim))
            case FromOffset():
                return self._form("X.storage_offset()", X=here[self._origin(value)])
            case FromNumber(number):
                return constant(number)
            case FromWeights(index):
                return "item", weights, constant(index)
            case _:
                assert_never(value)

    def _packed(
        self, packed: Packed, here: Mapping[Form, Form], weights: Form, outputs: int
    ) -> Form:
        match packed:
            case FromLeaf(index):
                return here[self.scope.leaves[index]]
            case FromOutput(index):
                return "bound", outputs, index
            case FromWeights(index):
                return "item", weights, constant(index)
            case FromConst(value):
                return constant(value)
            case FromItems() | FromCall():
                items = [self._packed(each, here, weights, outputs) for each in packed.children]
            case _:
                assert_never(packed)
        if isinstance(packed, FromCall):
            args = ("List", *items), constant(packed.context)
            return "call", constant(packed.rebuild), args, ()
        if packed.kind is dict:
            return "Dict", tuple(map(constant, packed.keys)), tuple(items)
        return "List" if packed.kind is list else "Tuple", *items


def _expression_of(check: checks.Check) -> str:
    """The text over symbols that a check computes; "" if it has none."""
    match check:
        case checks.SizeIs(size=str() as text) | checks.StrideIs(size=str() as text):
            return text
        case (
            checks.IntegerIs(size=text) | checks.Relation(text) | checks.ItemIs(value=str() as text)
        ):
            return text
        case _:
            return ""


def _leaves_of(packed: Packed) -> Iterator[int]:
    if isinstance(packed, FromLeaf):
        yield packed.index
    for child in packed.children if isinstance(packed, (FromItems, FromCall)) else ():
        yield from _leaves_of(child)


def _reads_weights(plan: EntryPlan) -> bool:
    def returns(packed: Packed) -> bool:
        children = packed.children if isinstance(packed, (FromItems, FromCall)) else ()
        return isinstance(packed, FromWeights) or any(map(returns, children))

    return any(isinstance(each, FromWeights) for each in plan.passed) or returns(plan.result)
