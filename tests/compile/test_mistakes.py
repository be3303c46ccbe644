"""What a new user gets wrong. In: a mistake. Out: a typed error of few lines that says what is wrong and what to do."""

from __future__ import annotations

import copy
import pickle
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental.proxy_tensor import make_fx

import piecework
from piecework import CompilationConfig
from piecework.errors import (
    ArtifactError,
    BindError,
    CaptureError,
    ConfigError,
    EmitError,
    InputError,
    NotThereError,
    PieceworkError,
    SplitError,
    StaticGraphError,
    short_errors,
)

X = torch.randn(4, 8)
SHORT = 40  # lines of a traceback, those of the source text counted


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.drop = nn.Dropout()

    def method(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.sin(self.layer(x)))


def config(**fields: object) -> CompilationConfig:
    return CompilationConfig(backend="eager", **fields)


def compiled(
    model: Callable[..., object] | None = None, *args: object, **options: object
) -> object:
    model = Model().eval() if model is None else model
    options.setdefault("config", config())
    return piecework.compile(model, args or (X,), **options)


def stitched() -> piecework.StitchedModule:
    return compiled()


def waiting() -> piecework.StitchedModule:
    """Compiled at its first call."""
    return piecework.compile(Model().eval(), config=config())


def captured(**options: object) -> piecework.StitchedModule:
    return stitched().capture([4], progress=False, **options)


@torch.library.custom_op("mistakes::fakeless", mutates_args=())
def fakeless(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@piecework.splitting_op("mistakes::halve")
def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


def calls_fakeless(x):
    return torch.ops.mistakes.fakeless(x) + 1


def branches(x):
    return x if x.sum() > 0 else -x


def prints(x):
    print("hi")
    return x * 2


def multiplies_wrongly(x):
    return x @ torch.randn(3, 3)


def marked() -> torch.Tensor:
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 1)
    return x


async def later(x):
    return x


def plain(self, states):
    return states * 2


def takes_a_dict(x: dict) -> torch.Tensor:
    return x["x"]


class KeptEager(nn.Module):
    @torch.compiler.disable(reason="the team keeps this eager")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def named_and_more(*xs, **named):
    return xs[0] * xs[1] * named["y"]


class Mine(torch.Tensor):
    pass


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(8), torch.randn(8)], layout=torch.strided)


class Result:
    __slots__ = ("x",)


def returns_an_object(x):
    found = Result()
    found.x = x
    return found


def misplaced(name: str) -> Callable[[], object]:
    return lambda: compiled(**{name: 1})


def split_at(*ops: object, **fields: object) -> Callable[[], object]:
    return lambda: compiled(splitting_ops=[*ops], config=config(**fields))


def bare(**members: object) -> type[nn.Module]:
    return type("Bare", (nn.Module,), members)


# fmt: off
MISTAKES: list[tuple[Callable[[], object], type[PieceworkError], str, str]] = [
    # --- what is compiled
    (lambda: compiled(Model), ConfigError, "the class Model, not an instance", "the model itself"),
    (lambda: compiled(3), ConfigError, "got a int", "the model itself"),
    (lambda: piecework.load(Model(), "model.artifact"), ConfigError, "got a str", "load(path, model)"),
    (lambda: compiled(torch.jit.trace(nn.Linear(8, 8), X)), ConfigError, "TorchScript", ""),
    (lambda: compiled(torch.export.export(nn.Linear(8, 8), (X,))), ConfigError, ".module()", ""),
    (lambda: compiled(later), ConfigError, "later, which returns a coroutine", ""),
    (lambda: compiled(stitched()), ConfigError, "stitched already", ""),
    (lambda: compiled(nn.Sequential(stitched())), CaptureError, "", ""),
    (lambda: compiled(nn.Sequential(KeptEager())), CaptureError, "keeps this eager", "docs/graph-breaks.md"),
    (lambda: piecework.load("/nowhere", Model()), ArtifactError, "there is no artifact", "stitched.save"),
    # --- example arguments
    (lambda: piecework.compile(Model(), X), ConfigError, "is a tuple", "(x,)"),
    (lambda: piecework.compile(Model(), (X,), X), ConfigError, "a dict of arguments", ""),
    (lambda: compiled(None, X, X), CaptureError, "too many positional arguments", "forward takes"),
    (lambda: compiled(None, torch.randn(4, 9)), CaptureError, "", "call the model itself"),
    (lambda: compiled(lambda x, n: x + n["a"], X, {"a": numpy.ones(8)}), CaptureError,
     "n['a'] is a numpy.ndarray, which can't be traced", ""),
    (lambda: compiled(lambda x, size: x.expand(size), X, X.shape), CaptureError, "size is a torch.Size", "a tuple"),
    (lambda: compiled(None, [X]), CaptureError, "must be Tensor, not", "call the model"),
    (lambda: compiled(lambda held: held.x * 2, SimpleNamespace(x=X)), CaptureError,
     "argument held is a SimpleNamespace", "register_pytree_node"),
    # --- configuration
    (lambda: config(spliting_ops=[]), ConfigError, "did you mean splitting_ops?", ""),
    (lambda: config(mode="FAST"), ConfigError, "no compilation mode 'FAST'", ""),
    (lambda: config(compile_workers=0), ConfigError, "compile_workers", ""),
    (lambda: compiled(config="c.json"), ConfigError, "or a dict of its fields; got 'c.json'", ""),
    (lambda: compiled(config={"backend": "indutor"}), ConfigError, "no compiler 'indutor'", "use inductor"),
    (lambda: compiled(config={"backend": "math.pi"}), ConfigError, "can't be made", "MyCompiler"),
    (lambda: compiled(config=config(compile_sizes=[4096]), runtime_config={"max_num_batched_tokens": 64, "max_num_seqs": 8}),
     ConfigError, "4096", ""),
    # --- splitting ops
    (lambda: compiled(splitting_ops="aten::sin"), SplitError, "got aten::sin", "pass a list"),
    (split_at("sin"), SplitError, "not of the form 'ns::op'", "torch.ops.ns.op"),
    (lambda: compiled(splitting_ops=torch.ops.aten.sin), SplitError, "must be a list", "pass a list"),
    (split_at("mistakes::halv"), SplitError, "is not registered", "did you mean mistakes::halve?"),
    (split_at(None), SplitError, "neither a name nor an operator", "torch.sin"),
    (split_at("aten::cos", strict=True), SplitError, "not in the graph: aten::cos", "spelling"),
    (split_at(torch.Tensor.sin, strict=True), SplitError, "not in the graph", "without quotes"),
    (lambda: piecework.check_op("mistakes::halve", X), SplitError, "a tuple of arguments", "pass (x,)"),
    (lambda: compiled(calls_fakeless), CaptureError, "no fake implementation", "register_fake"),
    # --- graphs
    (lambda: piecework.split_graph(3, ["aten::add"]), SplitError, "a torch.fx.GraphModule; got a int", ""),
    (lambda: piecework.generate_execution_code(3), EmitError, "a torch.fx.GraphModule; got a int", ""),
    (lambda: piecework.verify(3, torch.fx.symbolic_trace(nn.ReLU())), EmitError, "a StitchedSource; got a int", ""),
    (lambda: piecework.verify("", nn.ReLU()), EmitError, "a torch.fx.GraphModule; got a ReLU", ""),
    # --- forwards that can't be traced
    (lambda: compiled(branches), CaptureError, "Data-dependent branching", "splitting_op"),
    (lambda: compiled(prints), CaptureError, "`print`", "docs/graph-breaks.md"),
    (lambda: compiled(multiplies_wrongly), CaptureError, "raises RuntimeError", "call the model itself"),
    (lambda: compiled(lambda x: x + torch.ones(8, device="meta")), CaptureError, "device", "one device"),
    (lambda: compiled(returns_an_object), CaptureError, "returns a Result", "register_pytree_node"),
    (lambda: compiled(None, marked()), CaptureError, "Constraints violated", ""),
    # --- calls
    (lambda: stitched()(torch.randn(4, 9)), InputError, "x has size 9 in dimension 1", ""),
    (lambda: stitched()(X.as_subclass(Mine)), InputError, "type Mine", ""),
    (lambda: stitched().train()(X), InputError, "drop.training was False", "put it back"),
    # --- the stitched module as a module
    (lambda: stitched().to("cpu"), BindError, "can't be moved or converted", "convert the model"),
    (lambda: nn.Sequential(stitched()).double(), BindError, "can't be moved or converted", ""),
    (lambda: stitched().register_forward_hook(print), BindError, "no effect", "on the model before"),
    (lambda: setattr(stitched(), "layer", nn.Linear(8, 8)), BindError, "layer can't be set", ".model"),
    (lambda: setattr(stitched(), "new", nn.Parameter(X)), BindError, "new can't be set", ".model"),
    (lambda: setattr(stitched(), "forward", print), BindError, "forward can't be set", ""),
    (lambda: copy.deepcopy(stitched()), BindError, "can't be copied or pickled", "copy the model"),
    (lambda: pickle.dumps(stitched()), BindError, "can't be copied or pickled", ""),
    (lambda: torch.jit.script(nn.Sequential(stitched())), BindError, "can't be scripted", ""),
    (lambda: stitched().prepare(X), BindError, "compiled already", "compile the model again"),
    (lambda: waiting().source, NotThereError, "no source yet", "pass example arguments"),
    (lambda: waiting().rebind(), NotThereError, "at its first call", ""),
    (lambda: waiting().capture([4]), NotThereError, "at its first call", ""),
    (lambda: stitched().use_edited(""), EmitError, "takes (None)", "keep the"),
    (lambda: stitched().use_edited(None), EmitError, "is not Python", ""),
    # --- capture
    (lambda: captured().static_graphs.source_for(64), StaticGraphError, "runs uncaptured", "coverage()"),
    (lambda: stitched().static_graphs, NotThereError, "nothing is captured", "call capture(sizes) first"),
    (lambda: captured().coverage(-1), ConfigError, "positive whole number; got -1", ""),
    (lambda: stitched().capture(4), ConfigError, "takes a list of batch sizes", "capture([1, 2, 4])"),
    (lambda: stitched().capture([]), ConfigError, "no batch size to capture", ""),
    (lambda: stitched().capture([10**9]), ConfigError, "not 1000000000", "up to 16,777,216"),
    (lambda: stitched().capture([4, "8"]), ConfigError, "positive whole numbers, not '8'", ""),
    (lambda: captured(mod="FULL"), ConfigError, "did you mean mode?", "CaptureOptions"),
    (lambda: captured(mode="FUL"), ConfigError, "no CUDA graph mode 'FUL'; use one of", "CaptureOptions"),
    (lambda: captured(memory_budget=-1), ConfigError, "number of bytes; got -1", ""),
    (lambda: stitched().capture([4], progress="yes"), ConfigError, "or a watcher; got 'yes'", ""),
    (lambda: captured(pads={"z": 0}), BindError, "no padded input 'z'", "inputs: x"),
    (lambda: captured(other_sizes={"x.1": 8}), ConfigError, "no dynamic size 'x.1'", "there are: none"),
    (lambda: stitched().measure([4], seconds=-1), ConfigError, "a positive number; got -1", ""),
    (lambda: captured().dispatch("x"), InputError, "a positive whole number of tokens; got 'x'", ""),
    # --- artifacts, weights, operators
    (lambda: stitched().save(3), ConfigError, "an artifact is a file; got 3", ""),
    (lambda: piecework.compile(Model(), config=config(), artifact="a"), ConfigError, "example", ""),
    (lambda: compiled(config=config(mode="NONE"), artifact="a"), ConfigError, "compiles nothing", ""),
    (lambda: stitched().save("nothing://model"), ConfigError, "an artifact is a file", "copy the file"),
    (lambda: stitched().refit(3), ConfigError, "got a int", "state_dict()"),
    (lambda: stitched().refit({"layer.wieght": X}), BindError, "no such weight", "did you mean layer.weight?"),
    (lambda: stitched().refit({"layer.bias": X}), BindError, "the new one (4, 8)", "again"),
    (lambda: piecework.splitting_op("my-lib::mix"), SplitError, "'my-lib::mix'", "as Python's are"),
    (lambda: piecework.splitting_op("mistakes::mix")(lambda x: x), SplitError, "no operator schema", "annotate"),
    (lambda: piecework.splitting_op("mistakes::mix")(Model), SplitError, "is made of a function", ""),
    (lambda: piecework.splitting_op("mistakes::mix")(takes_a_dict), SplitError, "unsupported type", "Tensor"),
    (lambda: halve.register_kernel("cudaa"), SplitError, "torch knows no device 'cudaa'", 'say "cpu"'),
    (lambda: piecework.declare_rows("mistakes::halv", "independent"), SplitError, "no operator", "spelling"),
    (lambda: piecework.declare_rows("aten::sin", "maybe"), SplitError, "rows='maybe'", "'independent'"),
    (lambda: piecework.support_torch_compile(Model, enable_if=True), ConfigError, "must be callable", ""),
    (lambda: piecework.support_torch_compile(Model, dynamic_arg_dims={"x": "0"}), ConfigError,
     "a dimension or a list of them", "{'x': 0}"),
    (lambda: piecework.support_torch_compile(bare()), ConfigError, "Bare has no forward", "define forward"),
    (lambda: piecework.support_torch_compile(bare(forward=plain)), ConfigError,
     "without annotation: states", "dynamic_arg_dims={"),
    (lambda: piecework.support_torch_compile(branches), ConfigError, "classes of torch.nn.Module", ""),
    # --- arguments that belong elsewhere
    (misplaced("fullgraph"), ConfigError, "'fullgraph'", "it takes model, example_args"),
    (misplaced("spliting_ops"), ConfigError, "'spliting_ops'", "did you mean splitting_ops?"),
    (piecework.compile, ConfigError, "missing 1 required positional argument: 'model'", "it takes"),
    (lambda: stitched().save("x", keyfile="k"), ConfigError, "'keyfile'", "did you mean key_file?"),
    (lambda: piecework.counters.expect(num_inductor_compile=3).__enter__(), ConfigError,
     "no counter named num_inductor_compile", "did you mean num_inductor_compiles?"),
    # --- tensors of other kinds
    (lambda: compiled(None, nested()), CaptureError, "is a nested tensor", "pad what is nested"),
    (lambda: compiled(None, X.to_sparse()), CaptureError, "torch.sparse_coo", "dense"),
    (lambda: compiled(None, X.as_subclass(Mine)), CaptureError, "Mine, which can't", "plain"),
    # --- what would be silent
    (lambda: compiled(Model(), config=config(strict=True)), CaptureError, "in training mode", "model.eval()"),
    (lambda: compiled(config=config(strict=True))(X.clone().requires_grad_()), CaptureError,
     "backward() ends there", "train the model itself"),
    (lambda: compiled(config=config(strict=True, cudagraph_mode="PIECEWISE"))(X), StaticGraphError,
     "nothing is captured", "call capture(sizes)"),
]
# fmt: on


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_mistake_is_a_short_typed_error_with_a_remedy(number: int) -> None:
    make, kind, text, hint = MISTAKES[number]
    with pytest.raises(kind) as caught:
        make()
    error = caught.value
    assert type(error) is kind
    assert text in str(error)
    assert hint in str(error).partition("Hint:")[2]
    shown = "".join(traceback.format_exception(error)).splitlines()
    assert len(shown) < SHORT
    assert not any("torch/_dynamo" in line for line in shown)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("around", [lambda module: module, nn.Sequential])
def test_no_trace_of_torchscript_keeps_what_pieces_give(around) -> None:
    module = stitched()
    with pytest.raises(InputError, match=r"torch\.jit\.trace is active.*trace the model itself"):
        torch.jit.trace(around(module), X)
    assert module(X).shape == X.shape


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "trace",
    [
        lambda module: make_fx(module)(X),
        lambda module: torch.export.export(module, (X,)).module(),
    ],
)
@pytest.mark.parametrize("make", [stitched, captured, waiting])
def test_what_traces_a_call_sees_the_model(make, trace) -> None:
    module, other = make(), torch.randn(4, 8)
    with torch.no_grad():
        assert torch.equal(trace(module)(other), module.model(other))
    assert torch.equal(module(X), module.model(X))


@pytest.mark.parametrize("make", [stitched, waiting])
def test_what_gives_proxies_is_refused(make) -> None:
    with pytest.raises((PieceworkError, torch.fx.proxy.TraceError)):
        torch.fx.symbolic_trace(nn.Sequential(make()))


def test_operators_around_a_stitched_function_are_traced_into_it() -> None:
    traced = make_fx(compiled(lambda x: x * 2))(X)
    assert torch.equal(traced(X + 1), (X + 1) * 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"options": {"backnd": "eager"}}, "did you mean backend?"),
        ({"options": {"mode": "fast"}}, "no compilation mode 'fast'"),
        ({"options": {"splitting_ops": ["mylib::nope"]}}, "import the module that defines it"),
        ({"mode": "max-autotune"}, "would have no effect"),
        ({"options": {"cudagraph_mode": "PIECEWISE"}}, "PIECEWISE, would have no effect"),
    ],
)
def test_wrong_options_of_the_backend_are_told_through_torch(options, said: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(nn.Linear(8, 8).eval(), backend="piecework", **options)(X)
    assert said in str(caught.value)
    inner = caught.value.inner_exception
    assert isinstance(inner, PieceworkError)
    shown = "".join(traceback.format_exception(caught.value))
    assert "/runtime/" not in shown


def test_a_type_error_from_inside_is_none_of_the_arguments() -> None:
    def broken(left: int) -> int:
        return left + ""

    with pytest.raises(TypeError, match="unsupported operand"):
        short_errors(broken)(1)


@pytest.mark.filterwarnings("ignore")
def test_the_whole_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_FULL_TRACEBACK", "1")
    with pytest.raises(CaptureError) as caught:
        compiled(multiplies_wrongly)
    assert "torch/_dynamo" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: compiled(config=config(splitting_ops=["aten::cos"])),
            "not in the graph: aten::cos",
        ),
        (lambda: compiled(Model()), "in training mode, and its module drop (Dropout) goes by that"),
        (lambda: compiled(config=config(cudagraph_mode="PIECEWISE"))(X), "nothing is captured"),
        (
            lambda: compiled(config=config(cudagraph_capture_sizes=[2, 4]))(X),
            "nothing is captured, and the configuration has",
        ),
        (
            lambda: compiled(None, X.clone().requires_grad_()),
            "an argument requires grad, and what is compiled records no gradients",
        ),
        *(
            (lambda call=call: call(X.clone().requires_grad_()), "an argument requires grad")
            for call in (
                lambda x: stitched()(x),
                lambda x: piecework.compile(named_and_more, (X, X), {"y": X}, config=config())(
                    X, X, y=x
                ),
                lambda x: compiled(lambda xs: xs[0] * xs[1]["y"], (X, {"y": X + 1}))((X, {"y": x})),
                lambda x: stitched().capture([4], progress=False)(x),
            )
        ),
    ],
)
def test_what_was_silent_is_warned_of_where_the_user_wrote_it(make, text: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make()
    told = {
        (str(each.message), each.filename)
        for each in said
        if issubclass(each.category, UserWarning)
    }
    ((message, filename),) = told
    assert text in message
    assert Path(filename) == Path(__file__)


def test_gradients_that_end_in_torch_compile_are_told_of_too() -> None:
    run = torch.compile(Model().eval(), backend="piecework", options={"backend": "eager"})
    with pytest.warns(UserWarning, match="an argument requires grad"):
        assert run(X.clone().requires_grad_()).grad_fn is None
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an argument")
        run(X)  # its weights require grad, which means nothing


def test_what_only_the_model_has_is_said_so() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'method'; its model has: \.model\.m"):
        stitched().method(X)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = stitched().nothing
    assert not hasattr(stitched(), "method") and hasattr(stitched(), "layer")
    module = stitched()
    module.note = 3
    assert module.note == 3 and copy.copy(module.__dict__)["note"] == 3


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(nn.Linear(8, 8))  # in training mode, and nothing in it goes by that
        module = compiled(config=config(cudagraph_mode="PIECEWISE"))
        module.capture([4], progress=False)
        assert module(X).shape == X.shape
        module = compiled(config=config(cudagraph_capture_sizes=[2, 4]))
        assert module.capture(progress=False).static_graphs.sizes == (2, 4)
        assert module(X).shape == X.shape


def test_a_refused_size_says_what_its_own_trace_failed_by(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError) as caught:
        stitched()(torch.randn(4, 9))
    assert any("same reduction dim" in note for note in caught.value.__notes__)
    assert "Traceback" not in caplog.text
