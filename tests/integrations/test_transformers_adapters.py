"""Adapters and new weights of a stitched, captured model of transformers: PEFT's hot swap, what else PEFT does to a model, refits, and sleep."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import EAGER
from small_llms import build, generated

from piecework.errors import BindError, InputError
from piecework.integrations.transformers import sleep, stitch, stitched_module, unstitch, wake_up
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.counters import counters

transformers = pytest.importorskip("transformers")

INDUCTOR = CompilationConfig()
SIZES = [2, 4]


def check(model: Any, eager: Any) -> None:
    for batch in (2, 3):
        assert torch.equal(generated(model, batch), generated(eager, batch)), batch


def replays(model: torch.nn.Module) -> int:
    return sum(row.calls for row in stitched_module(model).call_report() if row.graph)


class Adapters:
    """Adapters with random weights in a folder, and models with one."""

    def __init__(self, folder: Path) -> None:
        self.hotswap = pytest.importorskip("peft.utils.hotswap")
        self.peft, self.folder = pytest.importorskip("peft"), folder

    def save(self, seed: int, rank: int = 4, alpha: int = 8) -> Path:
        targets = ["q_proj", "v_proj", "down_proj"]
        config = self.peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        model = self.peft.get_peft_model(build(), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
        model.save_pretrained(self.folder / f"{seed}")
        return self.folder / f"{seed}"

    def eager(self, path: Path) -> Any:
        return self.peft.PeftModel.from_pretrained(build(), path).eval()

    def served(self, path: Path, config: CompilationConfig = EAGER) -> Any:
        """A stitched, captured model with an adapter, made ready for others of a rank up to 8."""
        model = self.eager(path)
        self.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
        stitch(model.eval().get_base_model(), config=config, capture=SIZES)
        return model

    def swap(self, model: Any, path: Path) -> None:
        self.hotswap.hotswap_adapter(model, str(path), "default", torch_device="cpu")


@pytest.fixture
def adapters(tmp_path: Path) -> Adapters:
    return Adapters(tmp_path)


@pytest.mark.parametrize(
    "config",
    [EAGER, pytest.param(INDUCTOR, marks=[pytest.mark.inductor, pytest.mark.nightly])],
    ids=["eager", "inductor"],
)
def test_swapped_adapters_are_served_by_the_same_graphs(
    adapters: Adapters, config: CompilationConfig
) -> None:
    # Other ranks and other scalings too.
    paths = [adapters.save(*each) for each in ((1,), (2,), (3, 2, 3), (4, 8, 40))]
    model = adapters.served(paths[0], config)
    texts = {str(generated(each, 2)) for each in (build(), *map(adapters.eager, paths))}
    assert len(texts) == 5  # each adapter says something else
    with counters.expect(num_graphs_seen=0, num_cudagraph_captured=0):
        for path in (*paths[1:], paths[0]):
            adapters.swap(model, path)
            before = replays(model.get_base_model())
            check(model, adapters.eager(path))
            assert replays(model.get_base_model()) == before + 14  # every step behind a prefill
        caches = [transformers.DynamicCache() for _ in range(2)]
        reference = adapters.eager(paths[0])  # in the middle of a request too
        for path in paths:
            adapters.swap(model, path)
            reference.load_adapter(str(path), path.name)
            reference.set_adapter(path.name)
            with torch.no_grad():
                ours, theirs = (
                    each(torch.full((2, 1), 9), past_key_values=cache).logits
                    for each, cache in zip((model, reference), caches, strict=True)
                )
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_rank_above_the_prepared_one_is_refused(adapters: Adapters) -> None:
    model = adapters.served(adapters.save(1))
    larger = adapters.save(2, rank=16, alpha=8)
    adapters.swap(model, larger)  # PEFT gives the weights other memory and shapes
    with pytest.raises(
        InputError, match=r"lora_A.default.weight has shape \(16, 32\); the trace had \(8, 32\)"
    ):
        generated(model, 2)
    with pytest.raises(BindError, match="compile the model again"):
        stitched_module(model.get_base_model()).rebind()
    unstitch(model.get_base_model())
    check(model, adapters.eager(larger))
    stitch(model.get_base_model(), config=EAGER, capture=SIZES)
    check(model, adapters.eager(larger))


def test_an_adapter_put_on_a_stitched_model_is_noticed(adapters: Adapters) -> None:
    model = stitch(build(), config=EAGER, capture=SIZES)
    config = adapters.peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = adapters.peft.get_peft_model(model, config).eval()
    for _ in range(2):
        with pytest.raises(InputError, match=r"q_proj(\.weight)? was"):
            generated(wrapped, 2)
        with pytest.raises(BindError, match="q_proj"):
            stitched_module(model).rebind()
    plain = unstitch(model)
    expected = generated(wrapped, 2)
    stitch(plain, config=EAGER, capture=SIZES)
    assert torch.equal(generated(wrapped, 2), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_new_weights_in_place_reach_pieces_and_head(tied: bool) -> None:
    model = stitch(build(tie_word_embeddings=tied), config=EAGER, capture=SIZES)
    with counters.expect(num_graphs_seen=0, num_cudagraph_captured=0):
        for seed in range(4, 7):
            model.load_state_dict(build(seed=seed, tie_word_embeddings=tied).state_dict())
            check(model, build(seed=seed, tie_word_embeddings=tied))
    assert replays(model) == 42
    weights = build(seed=9).state_dict().items()
    decoder = {name: each for name, each in weights if name.startswith("model.")}
    stitched_module(model).refit(decoder)
    eager = build(seed=6, tie_word_embeddings=tied)
    eager.load_state_dict(decoder, strict=False)
    check(model, eager)
    model.load_state_dict(build(seed=4, tie_word_embeddings=tied).state_dict(), assign=True)
    with pytest.raises(InputError, match="was replaced"):
        generated(model, 2)


def test_a_head_that_is_replaced_is_not_served_by_its_old_graphs() -> None:
    model, other = stitch(build(), config=EAGER, capture=SIZES), build(seed=4)
    model.lm_head.weight = other.lm_head.weight
    with pytest.raises(InputError, match="weight was replaced"):
        generated(model, 2)


@pytest.mark.parametrize("nights", [4, pytest.param(20, marks=pytest.mark.nightly)])
def test_nights_of_sleep(nights: int) -> None:
    eager = build(num_hidden_layers=1)
    expected = generated(eager, 2)
    model = stitch(copy.deepcopy(eager), config=EAGER, capture=[2])
    parts = [stitched_module(model), model.lm_head.forward.stitched]
    held = [each.memory_report().held for each in parts]
    for _ in range(nights):
        sleep(model)
        for each in parts:
            with pytest.raises(BindError, match=r"nothing is captured.*wake_up\(\)"):
                each.coverage()
        wake_up(model)
        assert [each.memory_report().held for each in parts] == held
        assert torch.equal(generated(model, 2), expected)
        assert replays(model) == 7
    sleep(model)
    assert torch.equal(generated(model, 2), expected)
