"""What ``{"backend": "piecework"}`` becomes: piecework, or an error that says why; never another compiler."""

from __future__ import annotations

import pytest

from piecework.errors import ConfigError
from piecework.integrations.vllm import plugin


@pytest.fixture(autouse=True)
def registered():
    plugin.register()
    plugin.register()  # every process of an engine does, some twice


def settled(checkpoint: str, compilation, **engine):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=checkpoint, skip_tokenizer_init=True, compilation_config=compilation, **engine
    )
    return arguments.create_engine_config().compilation_config


@pytest.mark.parametrize("mode", [None, 2, 3, "VLLM_COMPILE"])
def test_every_mode_is_piecework(checkpoint, mode):
    given = {"backend": "piecework"} | ({} if mode is None else {"mode": mode})
    config = settled(checkpoint, given)
    assert (config.backend, int(config.mode), config.custom_ops) == ("piecework", 3, ["none"])
    assert "vllm::unified_attention_with_output" in config.splitting_ops


def test_the_environment_asks_too(checkpoint, monkeypatch):
    assert settled(checkpoint, {}).backend == "inductor"
    monkeypatch.setenv("VLLM_PIECEWORK", "1")
    assert settled(checkpoint, {}).backend == "piecework"
    assert settled(checkpoint, {"backend": "eager"}).backend != "piecework"


def test_the_users_own_word_on_custom_ops_holds(checkpoint):
    config = settled(checkpoint, {"backend": "piecework", "custom_ops": ["all"]})
    assert config.custom_ops == ["all"]


@pytest.mark.parametrize(
    ("compilation", "said"),
    [({"mode": 1}, "mode 1"), ({"use_inductor_graph_partition": True}, "cuts the graph itself")],
)
def test_what_can_not_be_is_refused(checkpoint, compilation, said):
    with pytest.raises(ConfigError, match=said):
        settled(checkpoint, {"backend": "piecework", **compilation})


def test_another_vllm_is_refused_by_name(checkpoint, monkeypatch):
    monkeypatch.setattr(plugin, "version", lambda: "9.9.9")
    with pytest.raises(ConfigError, match=r"9\.9\.9"):
        settled(checkpoint, {"backend": "piecework"})
    assert settled(checkpoint, {}).backend == "inductor"


def test_an_engine_decides_what_is_the_engines():
    from types import SimpleNamespace

    from piecework.integrations.vllm import engine

    config = SimpleNamespace(additional_config={"piecework": {"splitting_ops": []}})
    with pytest.raises(ConfigError, match="splitting_ops"):
        engine._own_options(config)
