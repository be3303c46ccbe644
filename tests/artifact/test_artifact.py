"""Artifacts: what was compiled runs in another process as it did, and nothing else does."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import EAGER, fresh
from processes import python
from python_state_cases import Run, alike, make_case, stock_is_stale
from torch import nn

import piecework
from piecework.errors import ArtifactError, BindError, InputError, PieceworkError
from piecework.runtime.artifact import program
from piecework.runtime.counters import counters
from piecework.runtime.store import package, surroundings
from piecework.runtime.store.package import KIND, Package, packed

SCRIPT = Path(__file__).with_name("artifact_model.py")
RATE = 2.0


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * RATE


class Layer(nn.Module):
    kind = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.factor = 0.5
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled(self.linear(fresh(x))) * self.factor + self.kind + self.seen


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor, flag: bool = True) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if flag else -x


def made(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().eval()


def saved(path: Path, model: nn.Module | None = None, *args: object, **config: object) -> Path:
    """The artifact of a model that ran uncompiled pieces."""
    options = piecework.CompilationConfig(backend="eager", **config)
    example = args or (torch.randn(3, 8),)
    piecework.compile(model or made(), example, config=options).save(path)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact that tests read and do not change."""
    return saved(tmp_path_factory.mktemp("artifact") / "model")


def refusal(path: Path, model: object, **options: object) -> str:
    with pytest.raises(ArtifactError) as found:
        piecework.load(path, model, **options)
    assert found.value.hint
    return str(found.value)


# --- what is loaded is what was saved -----------------------------------------------------------------


def test_a_loaded_model_gives_equal_results_for_every_size_and_traces_nothing(
    artifact: Path,
) -> None:
    model = made(1)
    with counters.expect(num_graphs_seen=0, num_backend_compilations=0, num_eager_compiles=0):
        stitched = piecework.load(artifact, model)
        for size in (0, 1, 2, 3, 17):
            x = torch.randn(size, 8)
            assert torch.equal(stitched(x), model(x))
    compiled = piecework.compile(made(), (torch.randn(3, 8),), config=EAGER)
    assert compiled.source.code == stitched.source.code
    assert compiled.entry_source.code == stitched.entry_source.code
    assert [each.name for each in stitched.pieces] and "read" in str(stitched.report())


def test_an_artifact_holds_no_weights(tmp_path: Path) -> None:
    model = made()
    with torch.no_grad():
        model.layers[0].linear.weight.fill_(1234.5)
    path = saved(tmp_path / "a", model)
    marks = torch.tensor([1234.5] * 4).numpy().tobytes()
    assert marks not in path.read_bytes()


def test_a_loaded_model_notices_what_changes_afterwards(artifact: Path) -> None:
    model = made()
    stitched = piecework.load(artifact, model)
    x = torch.randn(4, 8)
    stitched(x)
    model.layers[1].factor = 4.0
    with pytest.raises(InputError, match=r"layers\.1\.factor"):
        stitched(x)
    model.layers[1].factor = 0.5
    model.layers[0].linear.weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(InputError, match="rebind"):
        stitched(x)
    stitched.rebind()
    assert torch.equal(stitched(x), model(x))
    with pytest.raises(InputError):
        stitched(torch.randn(4, 9))
    original = Layer.forward
    try:
        Layer.forward = lambda self, x: x
        with pytest.raises(InputError, match="replaced"):
            stitched(x)
    finally:
        Layer.forward = original


def test_another_size_that_no_saved_trace_serves_is_traced(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1.0 if x.shape[0] > 1 else x - 1.0

    model = Rows()
    path = tmp_path / "a"
    piecework.compile(model, (torch.randn(3, 8),), config=EAGER).save(path)
    stitched = piecework.load(path, Rows())
    assert len(stitched.traces) == 2  # the batch of one was traced when the model was saved
    for size in (1, 2, 5):
        x = torch.randn(size, 8)
        assert torch.equal(stitched(x), model(x))


Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass
class Result:
    value: torch.Tensor
    extra: object = None


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x, n: int, *rest, scale=2.0, **more):  # type: ignore[no-untyped-def]
        y = x * self.weight * scale + n
        for each in rest:
            y = y + each
        found = Result(y, (n, "text", x.shape))
        return {
            "pair": Pair(y, x),
            "list": [y * more["gain"], None, 1.5],
            "result": found,
            "w": self.weight,
        }


def test_arguments_and_results_of_every_kind(tmp_path: Path) -> None:
    model, x = Many(), torch.randn(3, 8)
    call = lambda m, x, n: m(x, n, torch.ones(8), scale=3.0, gain=0.5)  # noqa: E731
    stitched = piecework.compile(
        model, (x, 7, torch.ones(8)), {"scale": 3.0, "gain": 0.5}, config=EAGER
    )
    stitched.save(tmp_path / "a")
    other = Many()
    loaded = piecework.load(tmp_path / "a", other)
    for size, n in ((3, 7), (5, 9)):
        x = torch.randn(size, 8)
        ours, theirs = call(loaded, x, n), call(other, x, n)
        assert type(ours["pair"]) is Pair and type(ours["result"]) is Result
        assert ours["pair"].right is x and ours["w"] is other.weight
        assert torch.equal(ours["result"].value, theirs["result"].value)
        assert ours["result"].extra == theirs["result"].extra == (n, "text", x.shape)
        assert torch.equal(ours["list"][0], theirs["list"][0]) and ours["list"][1:] == [None, 1.5]
    with pytest.raises(InputError):
        loaded(x, 7, torch.ones(8), scale=4.0, gain=0.5)


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(8))
        self.register_buffer("other", torch.zeros(8))

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.count.add_(x.sum(0))
        out.mul_(2.0)
        return x + self.count + self.other


def test_writes_to_buffers_and_arguments_happen(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", Writing(), torch.randn(3, 8), torch.randn(3, 8))
    ours, theirs = Writing(), Writing()
    stitched = piecework.load(path, ours)
    for size in (2, 4):
        x, out = torch.randn(size, 8), torch.randn(size, 8)
        same = out.clone()
        assert torch.allclose(stitched(x, out), theirs(x, same))
        assert torch.equal(out, same) and torch.allclose(ours.count, theirs.count)
    shared = Writing()
    memory = torch.zeros(8)
    shared.count, shared.other = memory, memory.view(8)
    assert "share memory" in refusal(path, shared)


def test_a_function_that_holds_a_module_is_a_model_too(tmp_path: Path) -> None:
    def around(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            return model(x) * 2.0

        return run

    piecework.compile(around(made()), (torch.randn(3, 8),), config=EAGER).save(tmp_path / "a")
    model = made(3)
    stitched = piecework.load(tmp_path / "a", around(model))
    x = torch.randn(5, 8)
    assert torch.equal(stitched(x), model(x) * 2.0)
    assert refusal(tmp_path / "a", model)


def test_levers_and_ranges_travel(tmp_path: Path) -> None:
    config = {
        "stitching_config": {"bind_weights": False, "direct_splitting_ops": False},
        "compile_ranges_endpoints": [4],
        "compile_sizes": [2],
    }
    path = saved(tmp_path / "a", **config)
    model = made(1)
    stitched = piecework.load(path, model)
    assert [str(each) for each in stitched.program.compile_ranges] == ["[2, 2]", "[1, 4]", "[5, …]"]
    for size in (1, 2, 3, 4, 5, 9):
        x = torch.randn(size, 8)
        assert torch.equal(stitched(x), model(x))
    assert stitched.config.stitching_config.bind_weights is False


def test_static_graphs_are_captured_of_a_loaded_model(artifact: Path) -> None:
    model = made(2)
    stitched = piecework.load(artifact, model).capture([1, 2, 4], progress=False)
    for size in (1, 2, 3, 4, 6):
        x = torch.randn(size, 8)
        torch.testing.assert_close(stitched(x), model(x).detach())
    assert "replay" in str(stitched.static_graphs.source_for(3))


def test_captures_of_a_loaded_model_see_what_is_written(tmp_path: Path) -> None:
    """The graphs that are read say which values share memory: what a compiled model refuses, a loaded one does."""
    example = torch.randn(3, 8), torch.randn(3, 8)
    stitched = piecework.compile(Writing(), example, config=EAGER)
    stitched.save(tmp_path / "a")
    loaded = piecework.load(tmp_path / "a", Writing())
    outcomes = []
    for each in (stitched, loaded):
        try:
            each.capture([4], progress=False)
        except PieceworkError as error:
            outcomes.append(str(error))
        else:
            outcomes.append(str(each.static_graphs.source_for(4)))
    assert outcomes[0] == outcomes[1]


def test_an_edited_source_travels_marked_as_edited(tmp_path: Path) -> None:
    stitched = piecework.compile(made(), (torch.randn(3, 8),), config=EAGER)
    stitched.use_edited(
        stitched.source.code.replace("import torch\n", "import torch\n\n# mine\n", 1)
    )
    stitched.save(tmp_path / "proved")
    stitched.use_edited(stitched.source.code.replace("return (", "print(end='')\n    return (", 1))
    stitched.save(tmp_path / "differing")
    for name, mark in (("proved", "proved to mean"), ("differing", "differs from")):
        path, model = tmp_path / name, made(1)
        assert mark in Package.read(path, None).facts["edits"][0]
        loaded = piecework.load(path, model)
        x = torch.randn(4, 8)
        assert torch.equal(loaded(x), model(x))
        loaded.save(tmp_path / f"{name}_again")
        again = piecework.load(tmp_path / f"{name}_again", made(1))
        assert again.traces[0].entry.now.edited == loaded.traces[0].entry.now.edited


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.full((4,), 2.0)
        self.register_buffer("cache", torch.zeros(6, 4))

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows.add_(1)
        factor = 3.0 if mask is self.plain else 2.0
        return x * factor + mask + self.cache[: x.shape[0]], rows * 2


def test_arguments_that_are_tensors_of_the_model_are_told(tmp_path: Path) -> None:
    x, rows = torch.randn(3, 4), torch.zeros(3, 4)
    piecework.compile(Asking(), (x, torch.ones(4), rows), config=EAGER).save(tmp_path / "a")
    model = Asking()
    loaded = piecework.load(tmp_path / "a", model)
    assert torch.equal(loaded(x, torch.ones(4), rows.clone())[0], x * 2 + 1)
    assert torch.equal(loaded(x, model.plain, rows.clone())[0], x * 3 + 2)  # by a trace of its own
    with pytest.raises(InputError, match="rows shares memory with the model's cache"):
        loaded(x, torch.ones(4), model.cache[:3])


# --- another process ----------------------------------------------------------------------------------


def run(what: str, tmp_path: Path, **environment: str) -> dict[str, object]:
    script = tmp_path / "artifact_model.py"
    if not script.exists():
        shutil.copy(SCRIPT, script)
    done = python(script, what, "model", "weights", cwd=tmp_path, **environment)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.inductor
def test_another_process_needs_no_compiler_and_no_cache(tmp_path: Path) -> None:
    for name in ("first", "empty", "nothing"):
        (tmp_path / name).mkdir()
    first = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "first")}
    assert run("save", tmp_path, **first)["pieces"] == 4
    found = run(
        "load",
        tmp_path,
        PATH=str(tmp_path / "nothing"),
        CXX="",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "empty"),
        TRITON_CACHE_DIR=str(tmp_path / "empty"),
        PIECEWORK_DISABLE_CACHE="1",
    )
    assert found["equal"] is True
    # Dynamo is imported once calls have come, for guards that make them cheap; changes are noticed before and after.
    assert found["first"]["dynamo"] is False and "layers.1.scale" in found["first"]["refused"]  # type: ignore[index, call-overload]
    assert "layers.1.scale" in str(found["refused"])
    assert (
        found["counters"] == {"num_models_seen": 1} and found["inductor"] == found["cached"] == []
    )
    kept = [Package.read(tmp_path / name, None).files for name in ("model", "model_again")]
    pieces = [{n: f for n, f in files.items() if n[:6] in ("pieces", "kernel")} for files in kept]
    assert len(pieces[0]) > 4 and pieces[0] == pieces[1]  # what was loaded is saved as it was
    script = tmp_path / "artifact_model.py"
    script.write_text(script.read_text().replace("self.down(", "-self.down(", 1))
    with pytest.raises(AssertionError, match=r"other code|source changed"):
        run("load", tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "empty"))


# --- a model that is another ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: setattr(m.layers[1], "factor", 0.25),
            r"layers\.1\.factor was 0\.5 .* and is 0\.25",
        ),
        (lambda m: m.layers.append(Layer().eval()), r"modules"),
        (lambda m: m.layers.__setitem__(0, nn.Identity()), "is not in the model"),
        (lambda m: m.double(), r"dtype torch\.float64"),
        (
            lambda m: setattr(m.layers[0].linear, "weight", nn.Parameter(torch.randn(8, 8).t())),
            "stride",
        ),
        (lambda m: setattr(m.layers[0].linear, "weight", m.layers[1].linear.weight), "names"),
        (lambda m: m.layers[0].register_forward_hook(lambda *a: None), "hooks|_forward_hooks"),
        (lambda m: setattr(m.layers[0], "forward", lambda x: x), "forward"),
        (lambda m: setattr(m, "__class__", nn.Identity), "Identity"),
    ],
)
def test_another_model_is_refused(
    artifact: Path, change: Callable[[Model], object], said: str
) -> None:
    model = made()
    change(model)
    assert re.search(said, refusal(artifact, model))


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (sys.modules[__name__], "RATE", 3.0),
        (sys.modules[__name__], "scaled", lambda x: x),
        (Layer, "forward", lambda self, x: x),
        (nn.Linear, "forward", lambda self, x: x),
        (Layer, "__getattr__", lambda self, name: 1.0),
        (nn.functional, "linear", torch.matmul),
    ],
)
def test_another_python_around_the_model_is_refused(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, value: object
) -> None:
    model = made()
    monkeypatch.setattr(owner, name, value, raising=False)
    assert refusal(artifact, model)


def test_hooks_for_every_module_are_refused(artifact: Path) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "hooks" in refusal(artifact, made())
    finally:
        handle.remove()


TEXT = """
import torch
from torch import nn

def inner(x):
    return x + 1.0

class Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
    def forward(self, x):
        return inner(self.linear(x))
"""


@pytest.fixture
def module_of(tmp_path: Path) -> Iterator[Callable[[str], types.ModuleType]]:
    """Makes a module of one name from a text, as a process that has that file does."""
    name = f"artifact_test_source_{tmp_path.name}"

    def make(text: str) -> types.ModuleType:
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        module = types.ModuleType(name)
        module.__file__ = str(file)
        sys.modules[name] = module
        exec(compile(text, str(file), "exec"), module.__dict__)
        return module

    yield make
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "text", [TEXT.replace("x + 1.0", "x + 2.0"), TEXT + "\nSame.__call__ = lambda self, x: x\n"]
)
def test_a_class_of_the_same_name_and_other_code_is_refused(
    tmp_path: Path, module_of: Callable[[str], types.ModuleType], text: str
) -> None:
    path = saved(tmp_path / "a", module_of(TEXT).Same())
    same = module_of(TEXT).Same()
    x = torch.randn(4, 8)
    assert torch.equal(piecework.load(path, same)(x), same(x))
    assert refusal(path, module_of(text).Same())


def test_code_that_is_not_in_its_file_is_told_by_what_it_runs(
    tmp_path: Path, module_of: Callable[[str], types.ModuleType]
) -> None:
    """The file is edited while the process that saves runs: the artifact is of the old code, and the new file's is refused."""
    model = module_of(TEXT).Same()
    other = TEXT.replace("x + 1.0", "x + 2.0")
    stitched = piecework.compile(model, (torch.randn(3, 8),), config=EAGER)
    Path(str(sys.modules[type(model).__module__].__file__)).write_text(other)
    stitched.save(tmp_path / "a")
    assert "inner" in refusal(tmp_path / "a", module_of(other).Same())


def test_another_operator_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_identity", lambda op: "another" if "fresh" in str(op) else "")
    assert "models.fresh" in refusal(artifact, made())


def python_state(number: int, tmp_path: Path) -> str:
    """Save a random model, change another one of the same text, and load: equal to eager, or refused."""
    case, path, file = make_case(number), tmp_path / f"{number}", tmp_path / f"{number}.py"
    file.write_text(case.source)
    with Run(case, number, str(file)) as run:
        if run.result(run.model) is None:
            return "not a model"
        try:
            args = dict(run.space["args"])
            piecework.compile(run.model, (torch.randn(3, 4),), args, config=EAGER).save(path)
        except PieceworkError:
            return "refused"
    for count in range(len(case.steps) + 1):
        with Run(case, number, str(file)) as run:
            for statement in case.steps[:count]:
                run.change(statement)
            try:
                ours = run.call(piecework.load(path, run.model), run.x)
            except PieceworkError:
                continue
            same = alike(ours, run.call(run.model, run.x))
            assert same or stock_is_stale(case, number, count), f"{case}\n{count}"
    return "served"


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("start", "count"),
    [
        (0, 10),
        (10, 10),
        *(pytest.param(n, 50, marks=pytest.mark.nightly) for n in range(1000, 2000, 50)),
    ],
)
def test_random_python_state_is_equal_to_eager_or_refused(
    start: int, count: int, tmp_path: Path
) -> None:
    found = [python_state(number, tmp_path) for number in range(start, start + count)]
    assert found.count("served") >= 0.4 * count, found


# --- where and by what it was made ----------------------------------------------------------------------


def test_another_version_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {**surroundings.versions(), "torch": "another"}
    monkeypatch.setattr(surroundings, "versions", lambda: here)
    assert "made with torch " in refusal(artifact, made())


def test_another_machine_is_refused_if_it_lacks_an_instruction(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = surroundings.host_factors()
    features = here["cpu_features"].split()
    monkeypatch.setattr(
        surroundings, "host_factors", lambda: {**here, "cpu_features": " ".join(features[1:])}
    )
    assert features[0] in refusal(artifact, made())
    more = {**here, "cpu_features": " ".join([*features, "avx9000"])}
    monkeypatch.setattr(surroundings, "host_factors", lambda: more)
    piecework.load(artifact, made())
    monkeypatch.setattr(surroundings, "host_factors", lambda: {**here, "machine": "pdp11"})
    assert "pdp11" in refusal(artifact, made())


@pytest.mark.parametrize(
    ("saved", "fits"), [("13.0 sm_90", True), ("13.0 sm_86", False), ("12.8 sm_90", False)]
)
def test_code_for_a_gpu_needs_one_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, saved: str, fits: bool
) -> None:
    here = surroundings.machine()
    needed = {**here, "device": {**here["device"], "cuda": saved}}
    with pytest.raises(ArtifactError, match=f"cuda {saved}, this machine lacks"):
        surroundings.require_same_machine(needed)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: [(8, 0), (9, 0)][at])
    refused = contextlib.nullcontext() if fits else pytest.raises(ArtifactError, match=saved)
    with refused:
        surroundings.require_same_machine(needed)


@pytest.mark.parametrize(
    ("setter", "value", "before", "said"),
    [
        (torch.use_deterministic_algorithms, True, False, "deterministic"),
        (torch.set_default_dtype, torch.float64, torch.float32, "default_dtype"),
    ],
)
def test_other_settings_of_torch_are_refused(
    artifact: Path, setter: Callable[[object], None], value: object, before: object, said: str
) -> None:
    setter(value)
    try:
        assert said in refusal(artifact, made().float())
    finally:
        setter(before)


# --- what is not saved --------------------------------------------------------------------------------------


def test_what_only_this_process_can_tell_is_refused_by_name(tmp_path: Path) -> None:
    from piecework.runtime.compilers import EagerAdaptor

    x = torch.randn(3, 8)
    stitched = piecework.compile(made(), (x,), config=EAGER)
    stitched.model.layers[0].factor = 9.0
    with pytest.raises(ArtifactError, match=r"layers\.0\.factor"):
        stitched.save(tmp_path / "a")
    with pytest.raises(BindError, match=r"not|yet"):
        piecework.compile(made(), config=EAGER).save(tmp_path / "a")
    with pytest.raises(ArtifactError, match="check_inputs"):
        saved(tmp_path / "a", stitching_config={"check_inputs": False})
    own = f"{EagerAdaptor.__module__}:{EagerAdaptor.__qualname__}"
    found = piecework.compile(made(), (x,), config={"backend": own})
    found.backend.compiler_manager.compiler.__class__ = type("Own", (EagerAdaptor,), {})
    with pytest.raises(ArtifactError, match="compiler"):
        found.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --- artifact= ----------------------------------------------------------------------------------------------


def test_compile_loads_an_artifact_that_fits_and_says_why_one_does_not(
    tmp_path: Path, warned: list[str]
) -> None:
    path, x = tmp_path / "a", torch.randn(3, 8)

    def compiled(model: nn.Module, **options: object) -> bool:
        before = counters.num_graphs_seen
        config = options.pop("config", EAGER)
        stitched = piecework.compile(model, (x,), config=config, artifact=path, **options)
        assert torch.equal(stitched(x), model(x))
        return counters.num_graphs_seen > before

    assert compiled(made()) and not warned and path.is_file()
    assert not compiled(made(1)) and not warned
    changed = made()
    changed.layers[0].factor = 7.0
    assert compiled(changed) and "factor" in warned.pop()
    assert compiled(made()) and "factor" in warned.pop()
    other = piecework.CompilationConfig(backend="eager", compile_ranges_endpoints=[4])
    assert compiled(made(), config=other) and "compile_ranges_endpoints" in warned.pop()
    assert not compiled(made(), config=other.replace(compile_workers=1)) and not warned
    path.write_bytes(path.read_bytes().replace(b"def check_inputs", b"def check_nothing"))
    assert compiled(made(), config=other) and "damaged" in warned.pop()
    assert not compiled(made(), config=other) and not warned
    assert compiled(made(), config=other, splitting_ops=()) and "splitting ops" in warned.pop()
    path.unlink()
    assert compiled(made()) and not warned  # as after a first save that was killed
    assert not compiled(made()) and not warned


def test_example_arguments_that_no_saved_trace_serves_compile_again(
    tmp_path: Path, warned: list[str]
) -> None:
    path, x = tmp_path / "a", torch.randn(3, 8)
    model = made()
    piecework.compile(model, (x,), config=EAGER, artifact=path)
    stitched = piecework.compile(model, (x, False), config=EAGER, artifact=path)
    assert torch.equal(stitched(x, False), model(x, False)) and "example arguments" in warned.pop()
    torch._dynamo.mark_dynamic(x, 0)
    stitched = piecework.compile(model, (x, False), config=EAGER, artifact=path)
    assert "sizes" in warned.pop() and torch.equal(stitched(x, False), model(x, False))


def rewritten(path: Path, change: Callable[[dict, dict], object]) -> None:
    """The artifact with a change, as somebody who knows how it is made would write it."""
    found = Package.read(path, None)
    files, facts = dict(found.files), dict(found.facts)
    change(files, facts)
    path.write_bytes(packed(files, facts, None, KIND))


SPOILT: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "older pieces": (
        lambda _, facts: facts["machine"]["versions"].update({"piecework sources": "older"}),
        "piecework sources older",
    ),
    "unreadable": (
        lambda files, _: files.update({"trace_0/state.pickle": b"not a pickle"}),
        "state.pickle",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_what_can_not_be_loaded_is_compiled_again_and_the_reason_is_said(
    artifact: Path, tmp_path: Path, warned: list[str], spoil: Callable, said: str
) -> None:
    path, model, x = tmp_path / "copy", made(), torch.randn(3, 8)
    shutil.copyfile(artifact, path)
    rewritten(path, spoil)
    assert said in refusal(path, model)
    before = counters.num_graphs_seen
    stitched = piecework.compile(model, (x,), config=EAGER, artifact=path)
    assert torch.equal(stitched(x), model(x)) and counters.num_graphs_seen > before
    assert said in warned[0] and len(warned) == 1
    assert torch.equal(piecework.load(path, made(2))(x), made(2)(x))


def test_a_path_that_can_not_be_written_is_said_and_the_model_is_compiled(
    tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: object, **__: object) -> bytes:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(package, "write_atomic", refusing)
    model, x = made(), torch.randn(3, 8)
    stitched = piecework.compile(model, (x,), config=EAGER, artifact=tmp_path / "a")
    assert torch.equal(stitched(x), model(x))
    assert "not saved" in warned[0] and "can't be written" in warned[0]


@pytest.mark.inductor
def test_a_piece_is_saved_only_as_it_runs_and_compiled_though_nobody_can_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    from piecework.runtime import torch_compat

    def full(_: object) -> bytes:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(torch_compat, "artifact_to_bytes", full)
    model, x = nn.Sequential(nn.Linear(8, 7), nn.Tanh()).eval(), torch.randn(3, 8)
    stitched = piecework.compile(model, (x,), config={"cache_dir": str(tmp_path / "cache")})
    assert torch.allclose(stitched(x), model(x)) and "can't be made: OSError" in warned[0]
    made = torch_compat.generated_code
    monkeypatch.setattr(torch_compat, "kernel_file", lambda _: tmp_path / "gone")
    with pytest.raises(ArtifactError, match="a kernel of it is gone"):
        stitched.save(tmp_path / "a")
    moved = lambda *args: made(*args)._replace(text="\n" + made(*args).text)  # noqa: E731
    monkeypatch.setattr(torch_compat, "generated_code", moved)
    with pytest.raises(ArtifactError, match="not what Inductor's text says"):
        stitched.save(tmp_path / "a")
