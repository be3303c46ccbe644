"""A stitched model behind transformers' own OpenAI-style server, which has no place to stitch one.

Routes, generation, streams, cancels and refusals are those of ``transformers serve``.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, ContinuousBatchingConfig, PreTrainedModel
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.utils import GenerationState
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from piecework.errors import InputError, UsageError
from piecework.integrations.protocol import first_line, require_packages
from piecework.integrations.transformers.stitcher import stitched_module

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

_NEVER = -1

MakeModel = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


class StitchedModels(ModelManager):
    """The one stitched model of transformers' server, made again after ``POST /reset``."""

    def __init__(self, name: str, make: MakeModel, state: GenerationState) -> None:
        super().__init__(model_timeout=_NEVER)
        self.force_model = name
        self._make, self._state = make, state
        self._making = threading.Lock()

    def load_model_and_processor(  # type: ignore[no-untyped-def]
        self, model_id_and_revision, progress_callback=None, tqdm_class=None, gguf_file=None
    ):
        """The model and its tokenizer; a request for another one is answered with 400."""
        from fastapi import HTTPException

        name = self.process_model_name(self.force_model)
        if model_id_and_revision != name or gguf_file is not None:
            raise HTTPException(400, f"this server has {self.force_model!r} and no other model")
        with self._making:
            held = self.loaded_models.get(name)
            cached = held is not None
            if held is None:
                model, tokenizer = self._make()
                held = TimedModel(
                    model, _NEVER, tokenizer, on_unload=lambda: self.loaded_models.pop(name, None)
                )
                self.loaded_models[name] = held
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": name, "cached": cached})
        return held.model, held.processor

    def get_gen_models(self) -> list[dict[str, object]]:  # type: ignore[override]
        """What ``/v1/models`` lists."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "piecework"}]

    def shutdown(self) -> None:
        self._state.shutdown()
        super().shutdown()

    def metrics(self) -> str:
        """What the model did so far, as Prometheus text; empty while it is unloaded."""
        models = [held.model for held in self.loaded_models.values()]
        found = [stitched_module(model).metrics(name=self.force_model) for model in models]
        return "".join(each.prometheus() for each in found)


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder; raises `UsageError` where none can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"can't load a tokenizer from {str(folder)!r}: {first_line(error)}",
            hint="a server needs the folder of a model with its tokenizer",
        ) from error


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet; `UsageError` if the address can't be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        why = f"can't listen at {host}, port {port}: {error}"
        raise UsageError(why, hint="give another --port; 0 takes a free one") from error
    return listener


def _answer_errors(app: FastAPI) -> None:
    """Have errors, and what a stitched model refuses, told as OpenAI's clients read it."""
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def refused(_request: object, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 400
        message = error.detail if isinstance(error, HTTPException) else str(error)
        return JSONResponse({"error": {"message": message}}, status)

    for kind in (HTTPException, InputError):
        app.add_exception_handler(kind, refused)


def make_server(
    name: str, make: MakeModel, *, batching: ContinuousBatchingConfig | None = None
) -> uvicorn.Server:
    """A server; ``run(sockets=[bound_socket(…)])`` serves until a signal or ``should_exit``."""
    require_packages(("fastapi", "uvicorn", "openai"), "serve")
    import uvicorn
    from fastapi.responses import PlainTextResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler

    state = GenerationState(continuous_batching=batching is not None, cb_config=batching)
    models = StitchedModels(name, make, state)
    models.load_model_and_processor(models.process_model_name(name))
    app = build_server(
        models,
        ChatCompletionHandler(models, state),
        completion_handler=CompletionHandler(models, state),
        response_handler=ResponseHandler(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
    )
    _answer_errors(app)
    app.get("/metrics", response_class=PlainTextResponse)(models.metrics)
    return uvicorn.Server(uvicorn.Config(app, log_level="info"))
