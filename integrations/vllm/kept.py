"""What vLLM's AOT compile keeps of a compiled graph, and how another process goes on from there without a trace or a compile."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from typing import Any

from torch._dynamo.aot_compile import SerializableCallable

from piecework.integrations.vllm.engine import called, declare_functions, settings
from piecework.integrations.vllm.forward import Place
from piecework.runtime.artifact.program import program_from_bytes, program_to_bytes
from piecework.runtime.pieces.bound_call import BoundCall
from piecework.runtime.pieces.program import Program

_log = logging.getLogger("vllm.piecework")


class Served(SerializableCallable):
    """A compiled graph as vLLM holds it.

    Args:
        program: what was compiled, or its bytes until `finalize_loading`.
        paths: of each input of the graph the path of the weight that it is, or None.
        places: of each input the argument of the model that it is, or None.
        prefix: what vLLM calls the model.
        is_encoder: whether it is an encoder.
        call: what runs.

    Attributes:
        run: what a call calls.
    """

    def __init__(
        self,
        program: Program | bytes,
        paths: Sequence[str | None],
        places: Sequence[Place | None],
        prefix: str,
        is_encoder: bool,
        call: BoundCall | None = None,
    ) -> None:
        self.program, self.paths, self.places = program, tuple(paths), tuple(places)
        self.prefix, self.is_encoder = prefix, is_encoder
        self.call = self.run = call

    def __call__(self, *args: object) -> object:
        assert self.run is not None, "finalize_loading was not called"
        return self.run(*args)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Served) -> bytes:
        """What the engine keeps: texts, kernels and plan, with their digest; no graph, no weight.

        Raises:
            ArtifactError: something can't be told again in another process; vLLM says so and starts without it next time.
        """
        kept = fn.program
        data = kept if isinstance(kept, bytes) else program_to_bytes(kept)
        return pickle.dumps((data, fn.paths, fn.places, fn.prefix, fn.is_encoder))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Served:
        return cls(*pickle.loads(data))

    def finalize_loading(self, vllm_config: Any) -> None:
        """Bind the pieces, inside of this process's static-graph wrappers. Nothing is traced, split or compiled.

        Raises:
            ArtifactError: it was changed, or made by or for something else; vLLM then compiles again, and says why.
        """
        if not isinstance(self.program, bytes):
            return
        config, _ = settings(vllm_config, self.is_encoder)
        declare_functions()
        self.program = program_from_bytes(self.program, config)
        self.call = self.run = called(self.program, self.paths, vllm_config)
        _log.info("[%s] %s", self.prefix, self.program.report())
