"""An encoder behind ``/v1/embeddings``, as OpenAI's clients ask for it.

A text's embedding is the mean of its tokens' last hidden states. It loads and compiles nothing.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from piecework.errors import UsageError
from piecework.integrations.protocol import require_packages
from piecework.integrations.transformers.openai_answers import answer_errors
from piecework.integrations.transformers.openai_requests import bad_request, positions_of

if TYPE_CHECKING:
    import uvicorn

    from piecework.integrations.protocol import LoadedModel
    from piecework.runtime.stitched import StitchedModule

_FORMATS = ("float", "base64")


class Embedder:
    """Texts to vectors by a stitched encoder, one request at a time.

    Args:
        stitched: takes what ``tokenizer`` makes, ``input_ids`` and ``attention_mask`` at least.
        tokenizer: of transformers.
        loaded: the model that was stitched, with the arguments that it was traced with.

    Raises:
        UsageError: it was traced with arguments that no tokenizer makes.
    """

    def __init__(self, stitched: StitchedModule, tokenizer: Any, loaded: LoadedModel) -> None:
        names = loaded.example_kwargs
        other = sorted(set(names) - set(tokenizer("a")))
        if other or "attention_mask" not in names:
            raise UsageError(
                f"this encoder takes {', '.join(other) or 'no attention_mask'}, and embeddings are of texts",
                hint="give the folder of an encoder of texts",
            )
        self.stitched, self.tokenizer = stitched, tokenizer
        self.longest = positions_of(loaded.module.config)  # type: ignore[attr-defined]
        self._names, self._turn = tuple(names), threading.Lock()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        """``[texts, hidden]`` in float32, and the number of tokens; raises ValueError for a text that is too long."""
        made = self.tokenizer(texts, return_tensors="pt", padding=True)
        mask = made["attention_mask"]
        counts = mask.sum(1)
        if self.longest is not None and int(counts.max()) > self.longest:
            raise ValueError(
                f"a text has {int(counts.max())} tokens, and the model has positions for {self.longest}"
            )
        with self._turn:
            device = next(self.stitched.parameters()).device
            states = self.stitched(**{name: made[name].to(device) for name in self._names})[0].cpu()
        weights = mask.unsqueeze(-1).to(torch.float32)
        return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1), int(counts.sum())


def make_embedding_server(name: str, embed: Callable[..., Any]) -> uvicorn.Server:
    """The server of an `Embedder`; ``run(sockets=…)`` serves until a signal.

    Args:
        name: what requests call the model.
        embed: texts to vectors and a number of tokens.

    Raises:
        UsageError: fastapi or uvicorn is missing.
    """
    require_packages(("fastapi", "uvicorn"), "serve")
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    app = FastAPI()
    answer_errors(app)

    def embeddings(body: dict[str, object]) -> dict[str, object]:
        if body.get("model", name) != name:
            raise bad_request(f"this server has {name!r} and no other model", "model")
        form = body.get("encoding_format") or "float"
        if form not in _FORMATS:
            raise bad_request(
                f"encoding_format is {form!r}, not float or base64", "encoding_format"
            )
        if body.get("dimensions") is not None:
            raise bad_request("this model's embeddings have one size", "dimensions")
        given = body.get("input")
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not texts or not all(_is_text(each) for each in texts):
            raise bad_request("input is neither a text nor a list of texts", "input")
        try:
            vectors, tokens = embed(texts)
        except ValueError as error:
            raise bad_request(str(error), "input") from error
        rows = [
            {"object": "embedding", "index": n, "embedding": _encoded(vector, form)}
            for n, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": rows, "model": name, "usage": usage}

    def models() -> Mapping[str, object]:
        row = {"id": name, "object": "model", "created": 0, "owned_by": "piecework"}
        return {"object": "list", "data": [row]}

    app.post("/v1/embeddings")(embeddings)
    app.get("/v1/models")(models)
    app.get("/health")(lambda: {"status": "ok"})
    if isinstance(embed, Embedder):
        metrics = embed.stitched.metrics
        app.get("/metrics", response_class=PlainTextResponse)(
            lambda: metrics(name=name).prometheus()
        )
    return uvicorn.Server(uvicorn.Config(app, log_level="info"))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _encoded(vector: torch.Tensor, form: object) -> object:
    if form == "float":
        return vector.tolist()
    return base64.b64encode(vector.cpu().numpy().tobytes()).decode("ascii")
