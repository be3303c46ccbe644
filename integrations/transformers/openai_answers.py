"""What transformers' server answers otherwise than OpenAI's clients expect: text after a stop, several prompts, errors.

It sits around transformers' own generation and handlers, and generates nothing itself.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

_CODES = {404: "not_found", 501: "unsupported", 503: "overloaded"}


class CutAtStop:
    """A manager of transformers' generation whose texts end before the text that stopped them.

    Args:
        manager: transformers' own; everything else is asked of it.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """As transformers' own, ``(text, input length, generated ids)``."""
        text, length, ids = await self._manager.generate_non_streaming(
            model, processor, inputs, gen_config, request_id=request_id
        )
        ends = [text.find(stop) for stop in stops_of(gen_config)]
        end = min((each for each in ends if each >= 0), default=len(text))
        return text[:end], length, ids

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **named: Any
    ) -> tuple[Any, Any]:
        """As transformers' own, ``(queue, streamer)``."""
        queue, streamer = self._manager.generate_streaming(
            model, processor, inputs, gen_config, *rest, **named
        )
        stops = stops_of(gen_config)
        return (UpToStop(queue, stops) if stops else queue), streamer


def stops_of(gen_config: Any) -> list[str]:
    """The texts that end an answer."""
    stops = gen_config.stop_strings or []
    return [stops] if isinstance(stops, str) else list(stops)


class UpToStop:
    """A queue of parts of a text, up to the first stop in it.

    What may be the beginning of a stop is held until the next part tells.
    """

    def __init__(self, queue: asyncio.Queue[Any], stops: Sequence[str]) -> None:
        self._queue, self._stops = queue, stops
        self._held = ""
        self._stopped = False
        self._ready: deque[object] = deque()

    async def get(self) -> object:
        """The next part; None, or what else transformers puts there, as it is."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> object:
        """As `get`; raises ``asyncio.QueueEmpty`` where nothing more is there."""
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, part: object) -> None:
        if not isinstance(part, str):
            if self._held and not self._stopped:
                self._ready.append(self._held)
            self._held = ""
            self._ready.append(part)
            return
        if self._stopped:
            return
        text = self._held + part
        ends = [text.find(stop) for stop in self._stops]
        end = min((each for each in ends if each >= 0), default=None)
        self._stopped = end is not None
        if end is None:
            end = len(text) - max(_begun(text, stop) for stop in self._stops)
        self._held = text[end:]
        if text[:end]:
            self._ready.append(text[:end])


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def joined(answers: Sequence[JSONResponse]) -> dict[str, Any]:
    """One completion of several: their choices numbered, their tokens added up."""
    bodies = [json.loads(bytes(each.body)) for each in answers]
    choices = [choice for body in bodies for choice in body["choices"]]
    return {
        **bodies[0],
        "choices": [{**choice, "index": n} for n, choice in enumerate(choices)],
        "usage": {
            name: sum(body["usage"][name] for body in bodies)
            for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        },
    }


def answer_errors(app: FastAPI) -> None:
    """Have an application's errors answered in the form that OpenAI's clients read."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def refused(_request: object, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        said = error.detail if isinstance(error.detail, dict) else {"message": str(error.detail)}
        body = {
            "type": "invalid_request_error" if error.status_code < 500 else "server_error",
            "param": None,
            "code": _CODES.get(error.status_code, "invalid_value"),
            **said,
        }
        return JSONResponse({"error": body}, error.status_code)

    async def unread(request: object, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(map(str, first.get("loc", ())))
        return await refused(request, HTTPException(400, f"{place}: {first['msg']}"))

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, unread)
