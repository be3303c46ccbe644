"""Programs as bytes: what comes back computes the same, and nothing that was changed is taken."""

import pytest
import torch
from torch import nn

from piecework import CompilationConfig
from piecework.errors import ArtifactError
from piecework.runtime.artifact.program import program_from_bytes, program_to_bytes
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.pieces.bound_call import BoundCall, bound_names, name_inputs

CONFIG = CompilationConfig(backend="eager", splitting_ops=["aten::sin"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.ops.aten.sin(self.a(x)))


@pytest.fixture(scope="module")
def made():
    """The bytes of a program, the paths of its inputs, and what it was called with and gave."""
    torch._dynamo.reset()
    found = {}

    def backend(graph, inputs):
        paths = name_inputs(graph)
        program = PieceworkBackend(CONFIG, "model").prepare(graph, bound_names(graph, paths))
        call = BoundCall(program, paths)

        def run(*args):
            found["args"], found["result"] = args, call(*args)
            return found["result"]

        found.update(data=program_to_bytes(program), paths=paths, source=program.source.code)
        return run

    with torch.no_grad():
        torch.compile(Model(), backend=backend, dynamic=True)(torch.ones(3, 4))
    return found


def test_it_computes_the_same_without_a_graph(made):
    program = program_from_bytes(made["data"], CONFIG)
    assert program.source.code == made["source"]
    result = BoundCall(program, made["paths"])(*made["args"])
    assert torch.equal(result[0], made["result"][0])
    with pytest.raises(ArtifactError, match="graphs"):
        program.graph  # noqa: B018


def test_another_torch_is_refused(made, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(ArtifactError, match=r"torch .* and here it is 9\.9"):
        program_from_bytes(made["data"], CONFIG)


def test_a_key_is_asked_for(made, tmp_path, monkeypatch):
    secret = tmp_path / "key"
    secret.write_bytes(b"0123456789abcdef")
    secret.chmod(0o600)
    monkeypatch.setenv("PIECEWORK_CACHE_KEY_FILE", str(secret))
    with pytest.raises(ArtifactError, match="signature"):
        program_from_bytes(made["data"], CONFIG)
