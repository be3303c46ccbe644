"""Artifacts of stitched transformers models: another process's model generates the same tokens, with nothing traced or compiled, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from small_llms import GEMMA, WINDOW
from small_llms import build as built
from torch import nn

from piecework.errors import ArtifactError, CaptureError, StaticGraphError, UsageError
from piecework.integrations.transformers import (
    how_served,
    load,
    save,
    stitch,
    stitched_module,
    unstitch,
)
from piecework.runtime.compile import load as load_module
from piecework.runtime.counters import counters

transformers = pytest.importorskip("transformers")
EAGER = {"backend": "eager"}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": GEMMA,
}
CHANGING_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def build(family: str = "llama", **fields: object) -> nn.Module:
    return built(family, **{**FAMILIES[family], **fields})


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = build()
    change(model)
    return model


def attention_of(model: nn.Module) -> nn.Module:
    return model.model.layers[1].self_attn  # type: ignore[no-any-return]


def tokens_of(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * batch + length)
    ids = torch.randint(1, 97, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, : length // 2] = 0
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)


def nothing_traced() -> AbstractContextManager[None]:
    return counters.expect(num_graphs_seen=0, num_backend_compilations=0, num_eager_compiles=0)


REQUESTS = ((1, 1), (1, 7), (2, 5), (3, 9), (1, 2))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact that tests read and do not change."""
    path = tmp_path_factory.mktemp("llama") / "artifact"
    save(stitch(build(), config=EAGER), path)
    return path


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_loaded_family_generates_the_tokens_of_eager_and_traces_nothing(
    family: str, tmp_path: Path
) -> None:
    path = tmp_path / "artifact"
    save(stitch(build(family, seed=1), config=EAGER), path)
    model = build(family)
    expected = [tokens_of(model, *each) for each in REQUESTS]
    with nothing_traced():
        assert load(path, model) is model
        found = [tokens_of(model, *each) for each in REQUESTS]
    assert all(map(torch.equal, found, expected))
    unstitch(model)
    assert torch.equal(tokens_of(model, *REQUESTS[1]), expected[1])


def test_rotary_frequencies_that_change_are_held_by_a_loaded_model(tmp_path: Path) -> None:
    fields = {"rope_parameters": CHANGING_ROPE, "max_position_embeddings": 8}
    path = tmp_path / "artifact"
    save(stitch(build(**fields), config=EAGER), path)
    requests = [(1, 3), (2, 12), (1, 3)]  # short, longer than was trained for, and back
    plain, model = build(seed=7, **fields), load(path, build(seed=7, **fields))
    for each in requests:
        assert torch.equal(tokens_of(model, *each), tokens_of(plain, *each))
    with pytest.raises(ArtifactError, match="rope"):
        load(path, build(max_position_embeddings=8))


def test_one_line_loads_what_fits_and_compiles_and_saves_what_does_not(
    tmp_path: Path, warned: list[str]
) -> None:
    path = tmp_path / "artifact"

    def traced(model: nn.Module, **options: object) -> bool:
        expected, before = tokens_of(model, 2, 5), counters.num_graphs_seen
        stitch(model, config=options.pop("config", EAGER), artifact=path, **options)
        assert torch.equal(tokens_of(model, 2, 5), expected)
        return counters.num_graphs_seen > before

    assert traced(build(num_hidden_layers=1)) and path.is_file() and not warned
    assert not traced(build(seed=2, num_hidden_layers=1)) and not warned
    assert traced(build(num_hidden_layers=2)) and "num_hidden_layers" in warned.pop()
    assert not traced(build(num_hidden_layers=2)) and not warned
    ranged = {**EAGER, "compile_ranges_endpoints": [4]}
    assert (
        traced(build(num_hidden_layers=2), config=ranged)
        and "compile_ranges_endpoints" in warned.pop()
    )
    assert not traced(build(num_hidden_layers=2), config=ranged) and not warned
    path.write_bytes(path.read_bytes()[:-1])
    assert traced(build(num_hidden_layers=1)) and "damaged" in warned.pop()
    assert not traced(build(num_hidden_layers=1)) and not warned


def test_static_graphs_are_captured_of_a_loaded_model(artifact: Path) -> None:
    from piecework.integrations.transformers.request.state import dry_request

    model = build(seed=5)
    expected = tokens_of(model, 2, 5)
    stitched = stitched_module(load(artifact, model))
    stitched.capture([1, 2, 4], context_for=dry_request, pad=True, progress=False)
    assert torch.equal(tokens_of(model, 2, 5), expected)
    assert any(each.calls for each in stitched.call_report())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: build(num_hidden_layers=3), "num_hidden_layers"),
        (lambda: build(num_key_value_heads=4), "num_key_value_heads"),
        (lambda: build(rms_norm_eps=1e-3), "rms_norm_eps"),
        (lambda: build("mistral"), "class|config"),
        (lambda: build().double(), "dtype"),
        (lambda: build().model, "class"),
        (lambda: changed(lambda m: m.set_attn_implementation("eager")), "attention was 'sdpa'"),
        (
            lambda: changed(lambda m: attention_of(m).register_forward_hook(lambda *_: None)),
            "hooks",
        ),
        (lambda: changed(lambda m: setattr(attention_of(m), "layer_idx", 0)), "layer 0"),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(
    artifact: Path, make: Callable[[], nn.Module], said: str
) -> None:
    model = make()
    with pytest.raises(ArtifactError, match=said) as found:
        load(artifact, model)
    assert found.value.hint
    assert not any("_piecework_layer_name" in each.__dict__ for each in model.modules())
    with pytest.raises(UsageError, match="not stitched"):
        unstitch(model)


def test_what_is_stitched_or_trains_is_not_loaded(artifact: Path) -> None:
    with pytest.raises(CaptureError, match="training"):
        load(artifact, build().train())
    with pytest.raises(UsageError, match="already"):
        load(artifact, load(artifact, build()))


def test_each_loader_names_the_other(artifact: Path, tmp_path: Path) -> None:
    import piecework

    with pytest.raises(ArtifactError, match=r"integrations\.transformers\.load"):
        load_module(artifact, build())
    linear = nn.Linear(4, 4)
    piecework.compile(linear, (torch.randn(3, 4),), config=EAGER).save(tmp_path / "linear")
    with pytest.raises(ArtifactError, match=r"piecework\.load"):
        load(tmp_path / "linear", build())


# --- served whole -------------------------------------------------------------------------------------

WHOLE: dict[str, dict[str, object]] = {"bloom": {"n_layer": 1, "n_head": 4}}


def whole(family: str = "bloom", seed: int = 0, **fields: object) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[family](
        **{"vocab_size": 97, "hidden_size": 32, "eos_token_id": None, "pad_token_id": 0},
        **{**WHOLE[family], **fields},
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def whole_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of a decoder that is served whole, for several sequences and for one."""
    path = tmp_path_factory.mktemp("bloom") / "artifact"
    model = stitch(whole(seed=1), config=EAGER)
    tokens_of(model, 1, 3)
    save(model, path)
    return path


def test_every_kind_of_call_of_a_decoder_that_is_served_whole_is_loaded(
    whole_artifact: Path,
) -> None:
    model = whole()
    requests = [each for each in REQUESTS if each[1] > 1]
    expected = [tokens_of(model, *each) for each in requests]
    with nothing_traced():
        assert load(whole_artifact, model) is model
        found = [tokens_of(model, *each) for each in requests]
    assert all(map(torch.equal, found, expected))
    served = how_served(model)
    assert served.way == "whole" and "position_ids" in served.not_flat and len(served.modules) == 4
    with torch.no_grad():
        given = {"input_ids": torch.tensor([[5]]), "use_cache": False}  # a kind that nobody saved
        alone = model(**given).logits
        assert len(how_served(model).modules) == 5
        torch.testing.assert_close(alone, unstitch(model)(**given).logits)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: whole(n_layer=2), "n_layer"),
        (lambda: whole(layer_norm_epsilon=1e-3), "layer_norm_epsilon"),
        (lambda: whole().double(), "dtype"),
        (lambda: build(), "attention"),
    ],
)
def test_another_model_is_not_served_whole(
    whole_artifact: Path, make: Callable[[], nn.Module], said: str
) -> None:
    model = make()
    with pytest.raises(ArtifactError, match=said):
        load(whole_artifact, model)
    with pytest.raises(UsageError, match="not stitched"):
        unstitch(model)


def test_what_is_served_whole_is_saved_whole(whole_artifact: Path, tmp_path: Path) -> None:
    model = load(whole_artifact, whole())
    with pytest.raises(ArtifactError, match="others serve the rest") as found:
        stitched_module(model).save(tmp_path / "a")
    assert "integrations.transformers.save(model, path)" in str(found.value.hint)
    save(model, tmp_path / "again")
    expected = tokens_of(model, 2, 5)
    assert torch.equal(tokens_of(load(tmp_path / "again", whole()), 2, 5), expected)
    with pytest.raises(ArtifactError, match=r"transformers\.load"):
        load_module(whole_artifact, whole())


def test_one_line_serves_whole(tmp_path: Path, warned: list[str]) -> None:
    path = tmp_path / "artifact"
    expected = tokens_of(whole(), 2, 5)
    stitch(whole(seed=3), config=EAGER, artifact=path)
    with nothing_traced():
        model = stitch(whole(), config=EAGER, artifact=path)
        assert torch.equal(tokens_of(model, 2, 5), expected)
    with pytest.raises(StaticGraphError, match="whole"):
        stitch(whole(), config=EAGER, artifact=path, capture=[1])
    assert not warned
    with pytest.raises(CaptureError, match="position_ids"):
        stitch(whole(), config=EAGER, artifact=path, way="flat")
    assert "the whole way" in warned.pop()
    path.write_bytes(path.read_bytes()[:-1])
    stitch(whole(), config=EAGER, artifact=path)
    assert "damaged" in warned.pop()
