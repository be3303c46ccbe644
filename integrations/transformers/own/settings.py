"""What a forward reads of a model's config. In: a config of transformers. Out: the few values that serving needs, read again when the config was written.

It never writes to a config.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.configuration_utils import PreTrainedConfig

RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")
# Without any of these, all layers attend to all that came before.
_NARROWER = ("layer_types", "sliding_window", "attention_chunk_size")


@dataclass(frozen=True, slots=True)
class Settings:
    """Attributes:
    implementation: the name of its attention function.
    use_cache, return_dict: defaults of a call.
    recorded: intermediate values that it asks for.
    sees_all: each token attends to all before it, in every layer.
    """

    implementation: str
    use_cache: bool
    return_dict: bool
    recorded: frozenset[str]
    sees_all: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Settings:
        return cls(
            implementation=config._attn_implementation,
            use_cache=getattr(config, "use_cache", False),
            return_dict=getattr(config, "return_dict", True),
            recorded=frozenset(name for name in RECORDED if getattr(config, name, False)),
            sees_all=config.get_text_config() is config
            and getattr(config, "is_causal", True) is True
            and all(_none(config, name) for name in _NARROWER),
        )


class ConfigReader:
    """Reads the settings of one config; a config has Python for each attribute, so it is asked only when it was written."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._read: tuple[dict[str, object], Settings] | None = None

    def now(self) -> Settings:
        held, read = vars(self._config), self._read
        if read is None or held != read[0]:
            before = dict(held)
            self._read = read = (before, Settings.of(self._config))
        return read[1]


def _none(config: PreTrainedConfig, name: str) -> bool:
    try:
        return getattr(config, name, None) is None
    except RuntimeError:  # raised for a field that differs from layer to layer
        return False
