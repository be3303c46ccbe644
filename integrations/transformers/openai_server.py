"""A stitched model behind transformers' own OpenAI-style server. In: what makes the model, its name, where to listen. Out: a uvicorn server.

It answers no request itself: routes, generation, streams and cancels are those of ``transformers serve``, which loads models by itself and has no place to stitch them.
What it can't serve is refused before (`openai_requests`).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, ContinuousBatchingConfig, PreTrainedModel
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from piecework.errors import InputError, UsageError
from piecework.integrations.protocol import first_line, require_packages
from piecework.integrations.transformers.openai_answers import answer_errors, joined
from piecework.integrations.transformers.openai_requests import Checked, Generation, bad_request
from piecework.integrations.transformers.stitcher import stitched_module

if TYPE_CHECKING:
    import uvicorn

_PACKAGES = ("fastapi", "uvicorn", "openai")
_NEVER = -1


class StitchedModels(ModelManager):
    """The models of transformers' server: one, stitched before it serves, and no other.

    Args:
        name: what requests call it.
        make: the stitched model and its tokenizer; called again if a client has the server unload its models (``POST /reset``).
        state: what generates, which ends with the models.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        state: Generation,
    ) -> None:
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
    """The tokenizer in a model's folder.

    Raises:
        UsageError: there is none, or it can't be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"can't load a tokenizer from {str(folder)!r}: {first_line(error)}",
            hint="a server needs the folder of a model with its tokenizer",
        ) from error


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address, held but not listening yet; port 0 takes a free one.

    Raises:
        UsageError: the address can't be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UsageError(
            f"can't listen at {host}, port {port}: {error}",
            hint="give another --port; 0 takes a free one",
        ) from error
    return listener


def make_server(
    name: str,
    make: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    *,
    batching: ContinuousBatchingConfig | None = None,
) -> uvicorn.Server:
    """The server of a model, which is made now; ``run(sockets=[bound_socket(…)])`` serves until a signal or ``should_exit``.

    Args:
        name: what requests call the model.
        make: the stitched model, and its tokenizer.
        batching: requests are computed together, by transformers' continuous batching; None: one after the other.

    Raises:
        UsageError: fastapi, uvicorn or openai is missing.
    """
    require_packages(_PACKAGES, "serve")
    import uvicorn
    from fastapi import HTTPException, Request, Response
    from fastapi.responses import JSONResponse, PlainTextResponse
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException as AnyHTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler

    class Chat(Checked, ChatCompletionHandler):
        needed = "messages"

    class Completion(Checked, CompletionHandler):
        needed = "prompt"

        async def handle_request(self, body: dict[str, object], request_id: str) -> Response:
            prompts = body.get("prompt")
            if not isinstance(prompts, list):
                return await super().handle_request(body, request_id)
            if not prompts or not all(isinstance(each, str) for each in prompts):
                raise bad_request("prompt is neither a text nor a list of texts", "prompt")
            if body.get("stream") and len(prompts) > 1:
                raise bad_request("a stream answers one prompt", "stream")
            answers = [
                await super(Completion, self).handle_request({**body, "prompt": each}, request_id)
                for each in prompts
            ]
            return answers[0] if body.get("stream") else JSONResponse(joined(answers))

    class Responses(Checked, ResponseHandler):
        needed = "input"

        async def handle_request(self, body: dict[str, object], request_id: str) -> Response:
            # OpenAI's own answers whole unless a stream is asked for.
            return await super().handle_request({"stream": False, **body}, request_id)

    class NoTranscriptions(TranscriptionHandler):
        async def handle_request(self, request: Request) -> Response:
            raise HTTPException(501, "this server's model reads text, and transcribes nothing")

    async def refused(request: Request, error: Exception) -> Response:
        return await app.exception_handlers[AnyHTTPException](request, bad_request(str(error)))

    state = Generation(batching)
    models = StitchedModels(name, make, state)
    models.load_model_and_processor(models.process_model_name(name))
    app = build_server(
        models,
        Chat(models, state),
        completion_handler=Completion(models, state),
        response_handler=Responses(models, state),
        transcription_handler=NoTranscriptions(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
    )
    answer_errors(app)
    for kind in (InputError, TemplateError):  # by the model, and by its chat template
        app.add_exception_handler(kind, refused)
    app.get("/metrics", response_class=PlainTextResponse)(models.metrics)
    return uvicorn.Server(uvicorn.Config(app, log_level="info"))
