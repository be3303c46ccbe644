"""What requests to the server may ask for. In: the body of a request, and what transformers makes of it. Out: nothing, or the answer 400 with what is wrong.

It computes no answer. Without it, transformers' handlers fail half-way in what they can't read (500), leave out what they don't do, and compute prompts that the model
has no positions for; where requests are computed together, one that has no tokens, or more than the cache has room for, ends them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    BaseHandler,
    GenerationState,
    Modality,
)

from piecework.integrations.protocol import first_line
from piecework.integrations.transformers.openai_answers import CutAtStop
from piecework.integrations.transformers.own.probe import field_of

# What transformers takes and leaves out, and the value that asks for nothing.
_NOT_DONE: Mapping[str, object] = {
    **{"n": 1, "best_of": 1, "echo": False, "logprobs": False, "top_logprobs": 0},
    **{"presence_penalty": 0, "response_format": {"type": "text"}, "functions": []},
    **{"previous_response_id": None, "audio": None, "background": False},
}
_TEXTS = ("text", "input_text", "output_text")
# Requests that are computed together have these of their own; everything else is the first one's.
_EACH_ITS_OWN = (
    *("max_new_tokens", "max_length", "eos_token_id"),
    *("bos_token_id", "pad_token_id", "use_cache", "transformers_version", "_from_model_config"),
)
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
# What configs call the number of positions, where it bounds a prompt.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_INT64 = 2**63

Check = Callable[[object], bool]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")  # type: ignore[arg-type]


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_stop(value: object) -> bool:
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(each, str) and each for each in words)


_VALUES: Mapping[str, tuple[str, Check]] = {
    "max_tokens": ("a number of tokens", _is_count),
    "max_completion_tokens": ("a number of tokens", _is_count),
    "max_output_tokens": ("a number of tokens", _is_count),
    "temperature": ("a number of 0 or more", lambda v: _is_number(v) and v >= 0),  # type: ignore[operator]
    "top_p": ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),  # type: ignore[operator]
    # transformers makes a factor of it, 1 + itself.
    "frequency_penalty": ("a number above -1", lambda v: _is_number(v) and v > -1),  # type: ignore[operator]
    "seed": ("an integer of 64 bits", lambda v: type(v) is int and -_INT64 <= v < _INT64),
    "stop": ("a text, or a list of texts", _is_stop),
    "stream": ("true or false", lambda v: isinstance(v, bool)),
    "tools": ("a list", lambda v: isinstance(v, list)),
    "chat_template_kwargs": ("an object", lambda v: isinstance(v, dict)),
}


class Generation(GenerationState):
    """What generates: a thread for requests one after the other, or a worker for them together. A worker that ended by an error is replaced for the next request.

    Args:
        batching: requests are computed together; None: one after the other.

    Attributes:
        sampling: how requests that are computed together choose tokens; None before the first.
        room: how many tokens their cache holds; None where the machine's memory decides, or nothing is shared.
    """

    def __init__(self, batching: ContinuousBatchingConfig | None) -> None:
        super().__init__(continuous_batching=batching is not None, cb_config=batching)
        self.sampling: Mapping[str, object] | None = None
        blocks = None if batching is None else batching.num_blocks
        self.room = None if blocks is None else blocks * batching.page_size  # type: ignore[union-attr]

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """transformers' manager of a model's requests."""
        if use_cb and self._worker_ended():
            self.shutdown()
        return CutAtStop(super().get_manager(model_id, use_cb=use_cb))  # type: ignore[return-value]

    def _worker_ended(self) -> bool:
        # A worker fails its requests before it says that it failed, and waits for ever for those that come between.
        worker = None if self._cb_manager is None else self._cb_manager._cb
        return worker is not None and bool(
            worker.background_thread_status.can_accept_new_requests()
        )

    def shutdown(self) -> None:
        """End what runs."""
        super().shutdown()
        self.sampling = None


class Checked(BaseHandler):
    """In front of a handler of transformers' server: the same, but for requests that it can't serve."""

    needed: ClassVar[str]
    generation_state: Generation

    def _validate_request(self, body: dict[str, object]) -> None:
        super()._validate_request(body)
        if body.get(self.needed) is None:
            raise bad_request(f"{self.needed} is missing", self.needed)
        for name, unasked in _NOT_DONE.items():
            if body.get(name) is not None and body[name] != unasked:
                raise bad_request(f"{name} is {body[name]!r}, which this server does not do", name)
        for name, (what, holds) in _VALUES.items():
            if body.get(name) is not None and not holds(body[name]):
                raise bad_request(f"{name} is {body[name]!r}, not {what}", name)

    @classmethod
    def _normalize_input(cls, body: dict[str, object]) -> list[dict[str, object]]:
        with _as_bad_request(cls.needed):
            return super()._normalize_input(body)  # type: ignore[misc]

    @classmethod
    def get_processor_inputs_from_messages(  # type: ignore[override]
        cls, messages: list[dict[str, object]], modality: Modality
    ) -> list[dict[str, object]]:
        with _as_bad_request(cls.needed):
            kinds = [
                part["type"]
                for message in messages
                if isinstance(message.get("content"), list)
                for part in message["content"]
            ]
            other = sorted(set(kinds).difference(_TEXTS))
            found = super().get_processor_inputs_from_messages(messages, modality)
        if not found:
            raise bad_request(f"{cls.needed} is empty", cls.needed)
        if other:
            raise bad_request(
                f"{cls.needed} has {', '.join(other)}, and the model reads text", cls.needed
            )
        return found

    def _build_generation_config(
        self,
        body: dict[str, object],
        model_generation_config: GenerationConfig,
        use_cb: bool = False,
    ) -> GenerationConfig:
        with _as_bad_request("the request"):
            made = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
            if body.get("logit_bias"):  # transformers wants no integers, which JSON has for 5.0
                made.sequence_bias = {key: float(v) for key, v in made.sequence_bias.items()}
            made.validate()
        if use_cb:
            self._require_alike(made)
        return made

    def _require_alike(self, made: GenerationConfig) -> None:
        if made.stop_strings:
            raise bad_request("stop is not done where requests are computed together", "stop")
        other = _EACH_ITS_OWN if made.do_sample else (*_EACH_ITS_OWN, *_OF_SAMPLING)
        asked = {name: v for name, v in made.to_dict().items() if v and name not in other}
        first = self.generation_state.sampling
        if first is None:
            self.generation_state.sampling = first = asked
        names = sorted(name for name in {*first, *asked} if first.get(name) != asked.get(name))
        if names:
            raise bad_request(
                f"requests that are computed together choose tokens alike, and this one differs from the first in {', '.join(names)}"
            )

    def _streaming(self, *args: object, **kwargs: object) -> object:
        self._fit(args)
        return super()._streaming(*args, **kwargs)  # type: ignore[misc]

    async def _non_streaming(self, *args: object, **kwargs: object) -> object:
        self._fit(args)
        return await super()._non_streaming(*args, **kwargs)  # type: ignore[misc]

    def _fit(self, args: tuple[object, ...]) -> None:
        """Refuse a prompt that can't be served; generate no more than there is room for, which the answer's ``finish_reason`` tells."""
        model = next(each for each in args if isinstance(each, PreTrainedModel))
        inputs = next(each for each in args if isinstance(each, Mapping) and "input_ids" in each)
        config = next(each for each in args if isinstance(each, GenerationConfig))
        ids, room = inputs["input_ids"], self.generation_state.room
        tokens = ids.shape[-1] if isinstance(ids, torch.Tensor) else len(ids)
        if not tokens:
            raise bad_request("the prompt has no tokens")
        if room is not None and tokens >= room:
            raise bad_request(f"the prompt has {tokens} tokens, and the cache has room for {room}")
        positions = positions_of(model.config)
        if positions is not None and tokens > positions:
            raise bad_request(
                f"the prompt has {tokens} tokens, and the model has positions for {positions}"
            )
        # The last token that is generated takes no position: nothing follows it.
        last = None if positions is None else positions + 1
        end = min((each for each in (room, last) if each is not None), default=None)
        if end is not None:
            config.max_new_tokens = min(config.max_new_tokens or end, end - tokens)


def positions_of(config: PreTrainedConfig) -> int | None:
    """For how many tokens a model has positions; None where its config names no limit, or frequencies follow the length."""
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    if "dynamic" in {ropes.get("rope_type"), *(_rope_type(each) for each in ropes.values())}:
        return None
    found = (field_of(text, name) for name in _POSITIONS)
    return next((n for n in found if type(n) is int and n > 0), None)


def _rope_type(of_layers: object) -> object:
    return of_layers.get("rope_type") if isinstance(of_layers, dict) else None


def bad_request(why: str, param: str | None = None) -> Exception:
    """The answer 400; ``param`` is the part of the request that is wrong."""
    from fastapi import HTTPException

    return HTTPException(400, {"message": why, "param": param})  # type: ignore[arg-type]


@contextmanager
def _as_bad_request(what: str) -> Iterator[None]:
    """Answer 400 where transformers can't read a part of a request."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise bad_request(
            f"{what} can't be read: {type(error).__name__}: {first_line(error)}"
        ) from error
