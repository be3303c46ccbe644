"""An encoder behind ``/v1/embeddings``, as OpenAI's clients ask for it.

Of each text it answers the mean of its tokens' last hidden states.
"""

from __future__ import annotations

import base64
import threading
from typing import TYPE_CHECKING, Any

import torch

from piecework.errors import UsageError
from piecework.integrations.protocol import require_packages
from piecework.integrations.transformers.openai_server import answer_errors

if TYPE_CHECKING:
    import uvicorn

    from piecework.integrations.protocol import LoadedModel
    from piecework.runtime.stitched import StitchedModule


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
                f"this encoder takes {', '.join(other) or 'no attention_mask'}, "
                "and embeddings are of texts",
                hint="give the folder of an encoder of texts",
            )
        self.stitched, self.tokenizer = stitched, tokenizer
        self.longest = getattr(loaded.module.config, "max_position_embeddings", None)  # type: ignore[attr-defined]
        self._names, self._turn = tuple(names), threading.Lock()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        """``[texts, hidden]`` in float32, and the number of tokens.

        Raises:
            ValueError: a text is longer than the model's positions.
        """
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


def make_embedding_server(name: str, embed: Embedder) -> uvicorn.Server:
    """The server of an encoder that requests call ``name``; ``run(sockets=…)`` serves until a
    signal.

    Raises:
        UsageError: fastapi or uvicorn is missing.
    """
    require_packages(("fastapi", "uvicorn"), "serve")
    import uvicorn
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import PlainTextResponse

    app = FastAPI()
    answer_errors(app)

    @app.post("/v1/embeddings")
    def embeddings(body: dict[str, object]) -> dict[str, object]:
        given = body.get("input")
        texts = given if isinstance(given, list) else [given]
        if not texts or not all(isinstance(each, str) and each for each in texts):
            raise HTTPException(400, "input is not a text, or a list of texts")
        as_bytes = body.get("encoding_format") == "base64"
        another = body.get("model", name) != name or body.get("dimensions") is not None
        if another or not (as_bytes or body.get("encoding_format") in (None, "float")):
            raise HTTPException(
                400, f"this is the model {name!r}: no dimensions, encoding_format float or base64"
            )
        try:
            vectors, tokens = embed(texts)
        except ValueError as error:
            raise HTTPException(400, f"input: {error}") from error
        rows = [
            {"object": "embedding", "index": n, "embedding": _encoded(vector, as_bytes)}
            for n, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": rows, "model": name, "usage": usage}

    @app.get("/v1/models")
    def models() -> dict[str, object]:
        row = {"id": name, "object": "model", "created": 0, "owned_by": "piecework"}
        return {"object": "list", "data": [row]}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        return embed.stitched.metrics(name=name).prometheus()

    app.get("/health")(lambda: {"status": "ok"})
    return uvicorn.Server(uvicorn.Config(app, log_level="info"))


def _encoded(vector: torch.Tensor, as_bytes: bool) -> object:
    if not as_bytes:
        return vector.tolist()
    return base64.b64encode(vector.numpy().tobytes()).decode("ascii")
