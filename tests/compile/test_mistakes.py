"""What a new user gets wrong. In: a mistake. Out: a typed error of few lines that says what is wrong and what to do."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensorMode
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


@torch.library.custom_op("mistakes::fakeless", mutates_args=())
def fakeless(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def calls_fakeless(x):
    return torch.ops.mistakes.fakeless(x) + 1


def branches(x):
    return x if x.sum() > 0 else -x


def prints(x):
    print("hi")
    return x * 2


def writes_sizes(x):
    return str(x.shape)


def multiplies_wrongly(x):
    return x @ torch.randn(3, 3)


def on_two_devices(x):
    return x + torch.ones(8, device="meta")


def raises(x):
    raise ValueError("not today")


def logs():
    def forward(x):
        logging.getLogger("mistakes").warning("hi")
        return x * 2

    try:
        compiled(forward)
    except CaptureError as error:
        assert "in forward" in str(error.where)
        raise


def marked() -> torch.Tensor:
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 1)
    return x


def faked() -> torch.Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(X)


async def later(x):
    return x


def in_parts(x):
    yield x


def plain(self, states):
    return states * 2


def takes_a_dict(x: dict) -> torch.Tensor:
    return x["x"]


@dataclasses.dataclass
class Held:
    x: torch.Tensor = dataclasses.field(default_factory=lambda: X)


def reads_what_is_held(held):
    return held.x * 2


def closed_over(shape: tuple[int, ...]) -> nn.Module:
    table = torch.ones(shape)

    class Closed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ table

    return Closed()


@piecework.splitting_op("mistakes::halve")
def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


class KeptEager(nn.Module):
    @torch.compiler.disable(reason="the team keeps this eager")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def named_and_more(*xs, **named):
    return xs[0] * xs[1] * named["y"]


class Mine(torch.Tensor):
    pass


def nested(layout: torch.layout = torch.strided) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(8), torch.randn(8)], layout=layout)


def strict_cut(op: object) -> object:
    return compiled(splitting_ops=[op], config=config(strict=True))


class Result:
    __slots__ = ("x",)


def returns_an_object(x):
    found = Result()
    found.x = x
    return found


MISTAKES: list[tuple[Callable[[], object], type[PieceworkError], str, str]] = [
    # --- what is compiled
    (
        lambda: compiled(Model),
        ConfigError,
        "Model is a class, not a model",
        "pass an instance: Model(...)",
    ),
    (lambda: compiled(3), ConfigError, "a model must be callable; got a int", "torch.nn.Module"),
    (
        lambda: compiled(Model().state_dict()),
        ConfigError,
        "must be callable; got a OrderedDict",
        "load the weights into a model",
    ),
    (
        lambda: piecework.load(Model(), "model.artifact"),
        ConfigError,
        "must be callable; got a str",
        "piecework.load(path, model)",
    ),
    (lambda: compiled(torch.jit.script(nn.Linear(8, 8))), ConfigError, "TorchScript", "made of"),
    (lambda: compiled(torch.jit.trace(nn.Linear(8, 8), X)), ConfigError, "TorchScript", "made of"),
    (
        lambda: compiled(torch.export.export(nn.Linear(8, 8), (X,))),
        ConfigError,
        "an exported program is no model",
        ".module()",
    ),
    (lambda: compiled(later), ConfigError, "later returns a coroutine or a generator", "tensors"),
    (lambda: compiled(in_parts), ConfigError, "in_parts returns a coroutine", "tensors"),
    (
        lambda: piecework.compile(stitched(), (X,)),
        ConfigError,
        "stitched already",
        "compile its .model",
    ),
    (
        lambda: compiled(nn.Sequential(stitched())),
        CaptureError,
        "calls a stitched module",
        ".model",
    ),
    (
        lambda: compiled(nn.Sequential(KeptEager())),
        CaptureError,
        "the team keeps this eager",
        "docs/graph-breaks.md",
    ),
    (lambda: piecework.load("/nowhere", Model), ConfigError, "is a class", "pass an instance"),
    (
        lambda: piecework.load("/nowhere", Model()),
        ArtifactError,
        "there is no artifact here",
        "stitched.save",
    ),
    (lambda: piecework.load(__file__, Model()), ArtifactError, "", ""),
    # --- example arguments
    (lambda: piecework.compile(Model(), X), ConfigError, "got a Tensor", "(x,)"),
    (lambda: piecework.compile(Model(), (X,), X), ConfigError, "got a Tensor", ""),
    (
        lambda: piecework.compile(Model().eval(), (X,), {1: X}),
        ConfigError,
        "must be a dict of arguments by name",
        "",
    ),
    (lambda: compiled(None, X, X), CaptureError, "too many positional arguments", "forward takes"),
    (
        lambda: piecework.compile(Model().eval(), (), {"y": X}),
        CaptureError,
        "missing a required argument: 'x'",
        "forward takes",
    ),
    (lambda: compiled(None, torch.randn(4, 9)), CaptureError, "", "call the model itself"),
    (lambda: compiled(None, [X]), CaptureError, "must be Tensor, not list", "call the model"),
    (lambda: compiled(None, None), CaptureError, "must be Tensor, not NoneType", "call the model"),
    (lambda: compiled(None, "x"), CaptureError, "must be Tensor, not str", "call the model"),
    (
        lambda: compiled(reads_what_is_held, Held()),
        CaptureError,
        "argument held is a Held, a class that torch's pytree does not know",
        "torch.utils._pytree.register_dataclass(Held)",
    ),
    (
        lambda: compiled(reads_what_is_held, SimpleNamespace(x=X)),
        CaptureError,
        "argument held is a SimpleNamespace",
        "register_pytree_node",
    ),
    *(
        (
            lambda shape=shape: compiled(closed_over(shape)),
            CaptureError,
            ".__closure__[0].cell_contents can't be looked up again",
            "hold it as a parameter, a buffer",
        )
        for shape in [(8,), (8, 8), (8, 5)]
    ),
    # --- configuration
    (
        lambda: config(spliting_ops=[]),
        ConfigError,
        "spliting_ops: is not a field of this configuration; did you mean splitting_ops?",
        "",
    ),
    (
        lambda: config(pass_config={"enable_ps": True}),
        ConfigError,
        "did you mean enable_sp?",
        "",
    ),
    (
        lambda: config(zzz=1),
        ConfigError,
        "zzz: is not a field of this configuration",
        "config schema",
    ),
    (lambda: config(mode="FAST"), ConfigError, "no compilation mode 'FAST'", ""),
    (lambda: config(cudagraph_mode="PIECWISE"), ConfigError, "use one of NONE, PIECEWISE", ""),
    (lambda: config(compile_workers=0), ConfigError, "compile_workers", ""),
    (lambda: compiled(config={"backnd": "eager"}), ConfigError, "did you mean backend?", ""),
    (lambda: compiled(config=3), ConfigError, "must be a CompilationConfig or a dict", "a dict of"),
    (lambda: compiled(config="c.json"), ConfigError, "got 'c.json'", "a dict of"),
    (
        lambda: compiled(config=CompilationConfig),
        ConfigError,
        "got <class",
        "CompilationConfig(...)",
    ),
    (
        lambda: compiled(config=config().replace(backend="indutor")),
        ConfigError,
        "no compiler 'indutor'",
        "use inductor",
    ),
    (
        lambda: compiled(
            config=config(compile_sizes=[4096]),
            runtime_config={"max_num_batched_tokens": 64, "max_num_seqs": 8},
        ),
        ConfigError,
        "4096",
        "",
    ),
    # --- splitting ops
    (
        lambda: compiled(splitting_ops="aten::sin"),
        SplitError,
        "got aten::sin",
        "pass a list",
    ),
    (
        lambda: compiled(splitting_ops=["sin"]),
        SplitError,
        "not of the form 'ns::op'",
        "torch.ops.ns.op",
    ),
    (
        lambda: compiled(splitting_ops=torch.ops.aten.sin),
        SplitError,
        "must be a list; got aten.sin",
        "pass a list",
    ),
    (lambda: compiled(splitting_ops={"aten::sin": 1}), SplitError, "must be a list", "a list"),
    (lambda: compiled(splitting_ops=[nn.Linear]), SplitError, "Linear is neither a name", ""),
    (
        lambda: compiled(splitting_ops=[nn.Linear(8, 8)]),
        SplitError,
        "splitting op Linear is neither a name nor an operator",
        "the operator that does its work",
    ),
    (
        lambda: compiled(splitting_ops=["torch.sin"]),
        SplitError,
        "'torch.sin' is not of the form",
        "without quotes",
    ),
    (
        lambda: compiled(splitting_ops=["mistakes::halv"]),
        SplitError,
        "mistakes::halv is not registered",
        "did you mean mistakes::halve?",
    ),
    (
        lambda: piecework.split_graph(torch.fx.symbolic_trace(Model()), None),
        SplitError,
        "must be a list; got None",
        "[] cuts nowhere",
    ),
    (
        lambda: piecework.check_op("mistakes::halve", X),
        SplitError,
        "must be a tuple of arguments",
        "pass (x,)",
    ),
    (
        lambda: compiled(splitting_ops=[None]),
        SplitError,
        "neither a name nor an operator",
        "torch.sin",
    ),
    (
        lambda: compiled(splitting_ops=["mylib::attention"]),
        SplitError,
        "mylib::attention is not registered",
        "import the module",
    ),
    (
        lambda: compiled(config=config(strict=True, splitting_ops=["aten::cos"])),
        SplitError,
        "not in the graph: aten::cos",
        "check the spelling",
    ),
    (
        lambda: compiled(
            lambda x: x.topk(2), splitting_ops=[torch.topk], config=config(strict=True)
        ),
        SplitError,
        "not in the graph: torch.topk",
        "no method of a tensor",
    ),
    # --- forwards that can't be traced
    (
        lambda: compiled(calls_fakeless),
        CaptureError,
        "mistakes::fakeless has no fake implementation",
        "register_fake",
    ),
    (
        lambda: compiled(calls_fakeless, splitting_ops=["mistakes::fakeless"]),
        CaptureError,
        "no fake implementation",
        "register_fake",
    ),
    (logs, CaptureError, "test_mistakes.py:", "docs/graph-breaks.md"),
    (lambda: compiled(branches), CaptureError, "Data-dependent branching", "splitting_op"),
    (lambda: compiled(prints), CaptureError, "`print`", "docs/graph-breaks.md"),
    (
        lambda: compiled(writes_sizes),
        CaptureError,
        "can't be captured as one graph",
        "splitting_op",
    ),
    (
        lambda: compiled(multiplies_wrongly),
        CaptureError,
        "own forward raises RuntimeError",
        "call the model itself",
    ),
    (
        lambda: compiled(on_two_devices),
        CaptureError,
        "device",
        "move the model and its arguments to one device",
    ),
    (
        lambda: compiled(raises),
        CaptureError,
        "own forward raises ValueError: not today",
        "call the model itself",
    ),
    (lambda: compiled(returns_an_object), CaptureError, "returns a Result", "register_pytree_node"),
    (
        lambda: compiled(None, marked()),
        CaptureError,
        "dimension 1 of argument 0 is marked as dynamic, and the model's code fixes it to 8",
        "leave the mark out",
    ),
    # --- calls
    (lambda: stitched()(faked()), InputError, "a FakeTensor", "trace the model itself"),
    (lambda: stitched()(torch.randn(4, 9)), InputError, "x has size 9 in dimension 1", ""),
    (
        lambda: stitched()(X.double()),
        InputError,
        "dtype torch.float64; the model was traced with torch.float32",
        "",
    ),
    (lambda: stitched()(X.to("meta")), InputError, "device meta", ""),
    (lambda: stitched()(None), InputError, "must be a tensor, not a NoneType", ""),
    (lambda: stitched()("x"), InputError, "must be a tensor, not a str", ""),
    (lambda: stitched()(torch.randn(8)), InputError, "", ""),
    (
        lambda: stitched().train()(X),
        InputError,
        "drop.training was False when the model was traced",
        "put it back",
    ),
    # --- the stitched module as a module
    (
        lambda: stitched().to("cpu"),
        BindError,
        "can't be moved or converted",
        "move or convert the model",
    ),
    (lambda: stitched().half(), BindError, "can't be moved or converted", "compile it again"),
    (lambda: nn.Sequential(stitched()).double(), BindError, "can't be moved or converted", ""),
    (
        lambda: stitched().register_forward_hook(print),
        BindError,
        "register_forward_hook has no effect",
        "on the model before",
    ),
    (lambda: stitched().register_buffer("b", X), BindError, "register_buffer has no effect", ""),
    (lambda: stitched().compile(), BindError, "compile has no effect", ""),
    (
        lambda: setattr(stitched(), "layer", nn.Linear(8, 8)),
        BindError,
        "layer can't be set",
        "set it on .model",
    ),
    (
        lambda: setattr(stitched(), "new", nn.Parameter(X)),
        BindError,
        "new can't be set",
        "set it on .model",
    ),
    *(
        (
            lambda name=name: setattr(stitched(), name, Model().eval()),
            BindError,
            f"{name} can't be set on a stitched module",
            "compile the model again",
        )
        for name in ("model", "forward", "config", "runtime_config", "as_it_is")
    ),
    (
        lambda: copy.deepcopy(stitched()),
        BindError,
        "can't be copied or pickled",
        "copy or pickle the model",
    ),
    (lambda: pickle.dumps(stitched()), BindError, "can't be copied or pickled", ""),
    (lambda: stitched().prepare(X), BindError, "compiled already", "compile the model again"),
    (
        lambda: piecework.compile(Model().eval(), config=config()).source,
        NotThereError,
        "no source yet",
        "pass example arguments",
    ),
    (
        lambda: piecework.compile(Model().eval(), config=config()).rebind(),
        NotThereError,
        "at its first call",
        "",
    ),
    (lambda: stitched().use_edited("x = ("), EmitError, "is not Python", ""),
    (lambda: stitched().use_edited(""), EmitError, "defines no function execution_fn", "keep the"),
    (lambda: stitched().use_edited(None), EmitError, "must be text; got a NoneType", "source.code"),
    (
        lambda: stitched().capture([4], progress=False).static_graphs.source_for(64),
        StaticGraphError,
        "size 64 runs uncaptured",
        "coverage()",
    ),
    # --- capture
    (
        lambda: stitched().static_graphs,
        NotThereError,
        "nothing is captured",
        "call capture(sizes) first",
    ),
    (
        lambda: stitched().capture([4], progress=False).coverage(-1),
        ConfigError,
        "positive whole number; got -1",
        "",
    ),
    (
        lambda: stitched().capture([4], progress=False).coverage("8"),
        ConfigError,
        "positive whole number; got '8'",
        "",
    ),
    (lambda: stitched().coverage(), NotThereError, "nothing is captured", "capture"),
    (
        lambda: stitched().capture(4),
        ConfigError,
        "takes a list of batch sizes; got 4",
        "capture([1, 2, 4])",
    ),
    (lambda: stitched().capture("1,2"), ConfigError, "got '1,2'", "capture([1, 2, 4])"),
    (lambda: stitched().capture([]), ConfigError, "no batch size to capture", ""),
    (lambda: stitched().capture([0]), ConfigError, "positive whole numbers, not 0", ""),
    (lambda: stitched().capture([-1]), ConfigError, "positive whole numbers, not -1", ""),
    (lambda: stitched().capture([10**9]), ConfigError, "not 1000000000", "up to 16,777,216"),
    (lambda: stitched().capture([1.5]), ConfigError, "positive whole numbers, not 1.5", ""),
    (lambda: stitched().capture([True]), ConfigError, "positive whole numbers, not True", ""),
    (lambda: stitched().capture([4, "8"]), ConfigError, "positive whole numbers, not '8'", ""),
    (
        lambda: stitched().capture([4], mod="FULL"),
        ConfigError,
        "mod: is not a field of this configuration; did you mean mode?",
        "CaptureOptions",
    ),
    (
        lambda: stitched().capture([4], colour="red"),
        ConfigError,
        "colour: is not a field of this configuration",
        "CaptureOptions",
    ),
    (
        lambda: stitched().capture([4], mode="FUL"),
        ConfigError,
        "no CUDA graph mode 'FUL'; use one of",
        "CaptureOptions",
    ),
    (
        lambda: stitched().capture([4], memory_budget="1G"),
        ConfigError,
        "number of bytes; got '1G'",
        "",
    ),
    (
        lambda: stitched().capture([4], on_failure="ignore"),
        ConfigError,
        "no failure policy 'ignore'; use one of",
        "CaptureOptions",
    ),
    (
        lambda: piecework.compile(Model().eval(), config=config()).capture([4]),
        NotThereError,
        "at its first call",
        "",
    ),
    (
        lambda: stitched().capture([4], address_policy="sometimes"),
        ConfigError,
        "no address policy 'sometimes'; use one of copy",
        "CaptureOptions",
    ),
    (lambda: stitched().capture([4], warmups=-1), ConfigError, "or equal to 0, got -1", ""),
    (lambda: stitched().capture([4], warmups="two"), ConfigError, "got 'two'", ""),
    (
        lambda: stitched().capture([4], strict="yes"),
        ConfigError,
        "strict: input should be a valid boolean",
        "",
    ),
    (lambda: stitched().capture([4], memory_budget=-1), ConfigError, "number of bytes; got -1", ""),
    (lambda: stitched().capture([4], progress="yes"), ConfigError, "or a watcher; got 'yes'", ""),
    (lambda: stitched().capture([4], join=3), ConfigError, "join: input should be callable", ""),
    (
        lambda: stitched().capture([4], around=3),
        ConfigError,
        "around: input should be callable",
        "",
    ),
    (
        lambda: stitched().capture([4], kind_of=3),
        ConfigError,
        "kind_of: input should be callable",
        "",
    ),
    (lambda: stitched().capture([4], runtime=3), ConfigError, "must be a RuntimeConfig", ""),
    (lambda: stitched().capture([4], axes={"a": 3}), ConfigError, "axes.a: input should be", ""),
    (lambda: stitched().capture([4], lora_counts=(-1,)), ConfigError, "ascend from 1", ""),
    (
        lambda: stitched().capture([4], memory_of=3),
        ConfigError,
        "instance of StaticGraphs, got 3",
        "",
    ),
    (lambda: stitched().capture([4], pads={"z": 0}), BindError, "no padded input 'z'", "inputs: x"),
    (
        lambda: stitched().capture([4], static=torch.zeros(9, 9)),
        ConfigError,
        "static: input should be a valid dictionary, got tensor",
        "",
    ),
    (lambda: stitched().capture([4], pads={"x": "0"}), ConfigError, "pads.x", ""),
    (
        lambda: stitched().capture([4], static={"cache": X}),
        BindError,
        "no argument 'cache' that keeps its memory",
        "",
    ),
    (
        lambda: stitched().capture([4], other_sizes={"x.1": 8}),
        ConfigError,
        "no dynamic size 'x.1'",
        "there are: none",
    ),
    (lambda: stitched().measure([4], seconds=-1), ConfigError, "a positive number; got -1", ""),
    (lambda: stitched().measure([0]), ConfigError, "positive whole numbers, not 0", ""),
    # --- artifacts, weights, operators
    (lambda: stitched().save(3), ConfigError, "in a directory; got 3", ""),
    (
        lambda: stitched().save("nothing://model"),
        ArtifactError,
        "this is a URL (nothing://model)",
        "copy the directory",
    ),
    (lambda: stitched().save(""), ConfigError, "in a directory; got ''", ""),
    (lambda: compiled(artifact=3), ConfigError, "in a directory; got 3", ""),
    (lambda: stitched().refit(3), ConfigError, "got a int", "state_dict()"),
    (
        lambda: stitched().refit({"classifier": X}),
        BindError,
        "no such weight (classifier)",
        "state_dict()",
    ),
    (
        lambda: stitched().refit({"layer.wieght": X}),
        BindError,
        "no such weight (layer.wieght)",
        "did you mean layer.weight?",
    ),
    (
        lambda: compiled(lambda x: x * 2).refit({"x": X}),
        BindError,
        "a function has no weights by name",
        "in place",
    ),
    (lambda: stitched().refit({"layer.bias": 3}), BindError, "must be a tensor; got a int", ""),
    (lambda: compiled(config={"backend": "math.pi"}), ConfigError, "can't be made", "MyCompiler"),
    (
        lambda: stitched().refit({"layer.bias": X}),
        BindError,
        "torch.float32[8], the new one torch.float32[4, 8]",
        "compile the model again",
    ),
    (
        lambda: stitched().refit({"layer.bias": torch.empty(8, device="meta")}),
        BindError,
        "on the meta device, which holds no data",
        "",
    ),
    (
        lambda: piecework.compile_execution_fn(None, {}, []),
        EmitError,
        "stitching source must be text; got a NoneType",
        "generate_execution_code",
    ),
    (
        lambda: piecework.splitting_op("mix"),
        SplitError,
        "not of the form 'namespace",
        "mylib::attention",
    ),
    (lambda: piecework.splitting_op("my-lib::mix"), SplitError, "'my-lib::mix'", "as Python's are"),
    (lambda: piecework.splitting_op("a::b-c"), SplitError, "'a::b-c'", "as Python's are"),
    (
        lambda: piecework.support_torch_compile(Model, enable_if=True),
        ConfigError,
        "enable_if must be callable",
        "enable_if=lambda config:",
    ),
    (
        lambda: piecework.support_torch_compile(Model, dynamic_arg_dims={"x": "0"}),
        ConfigError,
        "a dimension or a list of them",
        "{'x': 0}",
    ),
    (
        lambda: piecework.splitting_op("mistakes::mix")(lambda x: x),
        SplitError,
        "no operator schema for mistakes::mix",
        "annotate every parameter",
    ),
    (
        lambda: piecework.splitting_op("mistakes::mix")(Model),
        SplitError,
        "is made of a function",
        "",
    ),
    (
        lambda: piecework.splitting_op("mistakes::mix")(takes_a_dict),
        SplitError,
        "Parameter x has unsupported type",
        "Tensor, list[Tensor], int",
    ),
    (
        lambda: halve.register_kernel("cudaa"),
        SplitError,
        "torch knows no device 'cudaa'",
        'say "cpu"',
    ),
    (
        lambda: piecework.declare_rows("mistakes::halv", "independent"),
        SplitError,
        "there is no operator 'mistakes::halv'",
        "check its spelling",
    ),
    (
        lambda: piecework.declare_full_graphs("mistakes::halv", "always"),
        SplitError,
        "there is no operator 'mistakes::halv'",
        "import the module",
    ),
    (
        lambda: piecework.declare_rows("aten::sin", "maybe"),
        SplitError,
        "rows='maybe' of aten::sin is not known",
        "'independent'",
    ),
    (
        lambda: piecework.support_torch_compile(type("Bare", (nn.Module,), {})),
        ConfigError,
        "Bare has no forward",
        "define forward",
    ),
    (
        lambda: piecework.support_torch_compile(type("Plain", (nn.Module,), {"forward": plain})),
        ConfigError,
        "states has no annotation",
        "dynamic_arg_dims={'states': 0}",
    ),
    (
        lambda: piecework.support_torch_compile(Model()),
        ConfigError,
        "decorates classes of torch.nn.Module; got Model(",
        "piecework.compile",
    ),
    (
        lambda: piecework.support_torch_compile(branches),
        ConfigError,
        "decorates classes of torch.nn.Module",
        "piecework.compile",
    ),
    # --- arguments that belong elsewhere
    *(
        (
            lambda name=name: piecework.compile(Model().eval(), (X,), **{name: 1}),
            ConfigError,
            f"compile() got an unexpected keyword argument '{name}'",
            hint,
        )
        for name, hint in (
            ("mode", "config={'inductor_compile_config': {'max_autotune': True}}"),
            ("options", "config={'inductor_compile_config': {...}}"),
            ("fullgraph", "captured whole"),
            ("dynamic", "mark_dynamic"),
            ("disable", "TORCH_COMPILE_DISABLE=1"),
            ("backend", "config={'backend': ...}"),
            ("compile_sizes", "config={'compile_sizes': ...}"),
            ("max_num_seqs", "runtime_config={'max_num_seqs': ...}"),
            ("spliting_ops", "did you mean splitting_ops?"),
            ("example_inputs", "did you mean example_args?"),
            ("x", "it takes model, example_args, example_kwargs"),
        )
    ),
    (piecework.compile, ConfigError, "missing 1 required positional argument: 'model'", "it takes"),
    (
        lambda: piecework.compile(Model(), (X,), None, ["aten::sin"]),
        ConfigError,
        "positional arguments but 4 were given",
        "splitting_ops, config",
    ),
    (lambda: piecework.load("x", Model(), remap=True), ConfigError, "'remap'", "it takes path"),
    (lambda: stitched().save("x", keyfile="k"), ConfigError, "'keyfile'", "did you mean key_file?"),
    (
        lambda: piecework.counters.expect(num_inductor_compile=3).__enter__(),
        ConfigError,
        "no counter named num_inductor_compile",
        "did you mean num_inductor_compiles?",
    ),
    *(
        (lambda op=op: strict_cut(op), SplitError, "not in the graph", "without quotes")
        for op in (torch.Tensor.sin, "aten::sin", "aten::sin.default", torch.ops.aten.sin)
    ),
    # --- tensors of other kinds
    (lambda: compiled(None, nested()), CaptureError, "is a nested tensor", "pad what is nested"),
    (
        lambda: compiled(lambda x: x["a"][0] + 1, {"a": [nested()]}),
        CaptureError,
        "argument x['a'][0] is a nested tensor",
        "pad",
    ),
    (
        lambda: piecework.compile(Model().eval(), config=config())(nested()),
        CaptureError,
        "is a nested tensor",
        "pad",
    ),
    (lambda: stitched()(nested()), InputError, "is a nested tensor", "padded"),
    (lambda: compiled(None, X.to_sparse()), CaptureError, "torch.sparse_coo", "dense"),
    (
        lambda: compiled(None, torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)),
        CaptureError,
        "is a quantized tensor",
        "dense",
    ),
    (lambda: compiled(None, X.as_subclass(Mine)), CaptureError, "Mine, which can't", "plain"),
    (lambda: stitched()(X.to_sparse()), InputError, "layout torch.sparse_coo", "x.to_dense()"),
    (lambda: stitched()(X.double()), InputError, "dtype torch.float64", "x.to(torch.float32)"),
    (lambda: stitched()(X.to("meta")), InputError, "device meta", "x.to('cpu')"),
    (lambda: stitched()(X[0]), InputError, "rank 1", "pass x with 2 dimensions"),
    (lambda: stitched()(X.tolist()), InputError, "not a list", "torch.as_tensor(x)"),
    (lambda: stitched()(X.numpy()), InputError, "not a ndarray", "torch.as_tensor(x)"),
    # --- what else takes a module
    (lambda: torch.jit.script(stitched()), BindError, "can't be scripted", "script the model"),
    (
        lambda: torch.jit.script(nn.Sequential(stitched())),
        BindError,
        "can't be scripted",
        "stitched.save",
    ),
    # --- what a batch runs as
    *(
        (
            lambda ask=ask, size=size: ask(stitched().capture([4], progress=False), size),
            InputError,
            f"a positive whole number of tokens; got {size!r}",
            "the size of the batch",
        )
        for ask in (
            lambda module, size: module.dispatch(size),
            lambda module, size: module.static_graphs.source_for(size),
        )
        for size in ("x", None, 0, -1, 1.5, True)
    ),
    (lambda: stitched().dispatch("x"), InputError, "tokens; got 'x'", "the size of the batch"),
    # --- what would be silent
    (
        lambda: compiled(Model(), config=config(strict=True)),
        CaptureError,
        "in training mode, and its module drop (Dropout)",
        "model.eval()",
    ),
    (
        lambda: compiled(None, X.clone().requires_grad_(), config=config(strict=True)),
        CaptureError,
        "backward() ends there",
        "train the model itself",
    ),
    (
        lambda: compiled(config=config(strict=True))(X.clone().requires_grad_()),
        CaptureError,
        "backward() ends there",
        "train the model itself",
    ),
    (
        lambda: compiled(config=config(strict=True, cudagraph_mode="PIECEWISE"))(X),
        StaticGraphError,
        "nothing is captured",
        "call capture(sizes)",
    ),
]


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
@pytest.mark.parametrize("check", [True, False])
def test_no_trace_of_torchscript_keeps_what_pieces_give(around, check: bool) -> None:
    with pytest.raises(
        InputError, match=r"torch\.jit\.trace records.*Hint: trace the model itself"
    ):
        torch.jit.trace(around(stitched()), X, check_trace=check)
    module = stitched()
    with pytest.raises(InputError, match=r"torch\.jit\.trace records"):
        torch.jit.trace(lambda x: module(x) * 2, X, check_trace=check)
    assert module(X).shape == X.shape


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("around", [lambda module: module, nn.Sequential])
@pytest.mark.parametrize(
    "trace",
    [
        torch.fx.symbolic_trace,
        lambda module: make_fx(module)(X),
        lambda module: torch.export.export(module, (X,)),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        stitched,
        lambda: stitched().capture([4], progress=False),
        lambda: piecework.compile(Model().eval(), config=config()),
    ],
    ids=["stitched", "captured", "not yet compiled"],
)
def test_what_traces_a_stitched_module_is_told_to_trace_the_model(make, trace, around) -> None:
    module = make()
    with pytest.raises(
        InputError, match=r"torch\.fx traces this call.*Hint: trace the model itself"
    ):
        trace(around(module))
    if torch.nn.modules.module._global_buffer_registration_hooks:
        pytest.skip("torch 2.11 leaves its hook behind when an export fails")
    assert torch.equal(module(X), module.model(X))
    assert torch.equal(torch.compile(around(module), backend="eager")(X), module(X))


def test_operators_around_a_stitched_function_are_traced_into_it() -> None:
    traced = make_fx(compiled(lambda x: x * 2))(X)
    assert torch.equal(traced(X + 1), (X + 1) * 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"options": {"backnd": "eager"}}, "did you mean backend?"),
        ({"options": {"mode": "fast"}}, "no compilation mode 'fast'"),
        ({"options": {"splitting_ops": ["mylib::nope"]}}, "import the module that defines it"),
        ({"mode": "max-autotune"}, "inductor_compile_config takes Inductor's own"),
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
            "nothing is captured, and the configuration says cudagraph_capture_sizes=[2, 4]",
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


def test_gradients_that_nobody_records_are_no_matter() -> None:
    module = stitched()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert not module(X.clone().requires_grad_()).requires_grad


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


def test_whole_numbers_of_other_libraries_are_sizes() -> None:
    np = pytest.importorskip("numpy")
    for sizes in (np.array([2, 4]), torch.tensor([4, 2]), (np.int32(2), 4)):
        module = stitched().capture(sizes, progress=False)
        assert module.static_graphs.sizes == (2, 4)
        assert all(type(size) is int for size in module.static_graphs.sizes)


def test_the_short_form_names_the_sizes_that_are_captured() -> None:
    module = stitched().capture([2, 4], progress=False)
    assert "captured for 2, 4" in repr(module)
    module.sleep()
    assert "captured" not in repr(module)
    assert "captured" not in repr(stitched().capture([4], memory_budget=0, progress=False))


def test_torch_logs_no_traceback_beside_a_typed_error(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CaptureError):
        compiled(None, marked())
    assert "Error while creating guard" not in caplog.text


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
