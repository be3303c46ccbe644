"""An engine on piecework: its tokens, what it keeps, what it makes of damage."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

OURS = {"backend": "piecework"}


def same(found: dict[str, Any], eager: dict[str, Any]) -> None:
    assert found["exit"] == 0, found["log"][-5000:]
    assert found["tokens"] == eager["tokens"]
    rows = itertools.chain.from_iterable(
        zip(found["logprobs"][name], eager["logprobs"][name], strict=True)
        for name in eager["logprobs"]
    )
    for ours, theirs in rows:
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cold(engine: Any, cache: Path) -> dict[str, Any]:
    """The first start, of whoever asks for it."""
    return engine(cache=cache, compilation_config=OURS)


def test_cold(cold, eager):
    same(cold, eager)
    assert cold["backend"] == "piecework" and cold["custom_ops"] == ["none"]
    expected = {"num_graphs_seen": 1, "num_aot_artifacts_saved": 1}
    expected |= {"num_piecewise_graphs_seen": 9, "num_piecewise_capturable_graphs_seen": 5}
    expected |= {"num_inductor_compiles": 3}  # the first, the middle ones, the last
    assert expected.items() <= cold["counters"].items()


def test_warm_without_a_trace_or_a_compile(cold, engine, cache, eager):
    warm = engine(cache=cache, compilation_config=OURS)
    same(warm, eager)
    assert warm["counters"] == {"num_models_seen": 1, "num_aot_artifacts_loaded": 1}


def test_the_source_is_in_the_cache_folder(cold, cache):
    (source,) = cache.rglob("stitched.py")
    code = source.read_text()
    assert "layers.0.input_layernorm.weight" in code and "l_self_modules" not in code
    assert "past the dispatcher" in code


def test_damage_is_compiled_again(cold, engine, cache, eager):
    (model,) = (each for each in cache.rglob("torch_aot_compile/*/*/model"))
    data = bytearray(model.read_bytes())
    data[len(data) // 3] ^= 255
    model.write_bytes(bytes(data))
    again = engine(cache=cache, compilation_config=OURS)
    same(again, eager)
    assert "Compiling model again due to a load failure" in again["log"]
    assert again["counters"]["num_compiled_artifacts_loaded"] == 3  # the pieces were kept elsewhere


def test_a_killed_start_and_two_at_once(engine, tmp_path, eager):
    """One cache: one start is killed while it compiles, then two begin together."""
    kept = tmp_path / "torch_compile_cache" / "piecework"
    killed = engine.start(cache=tmp_path, compilation_config=OURS)(lambda: kept.exists())
    assert killed["exit"] == -9
    starts = [engine.start(cache=tmp_path, compilation_config=OURS) for _ in range(2)]
    for found in [finish() for finish in starts]:
        same(found, eager)
    after = engine(cache=tmp_path, compilation_config=OURS)
    same(after, eager)
    assert after["counters"] == {"num_models_seen": 1, "num_aot_artifacts_loaded": 1}


def test_static_graphs_of_the_engines_own_wrapper(engine, tmp_path, eager):
    """Each captured size is replayed, from the addresses that it was captured with."""
    sizes = [1, 2, 4, 8, 16, 32]
    config = {**OURS, "cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": sizes}
    prompts = [[1], [16], [200], [1, 3, 16, 40, 90, 120, 2, 7], [2], [5, 5], [30], [32]]
    found = engine(cache=tmp_path, graphs=True, compilation_config=config, prompts=prompts)
    for name, tokens in eager["tokens"].items():
        assert found["tokens"][name] == tokens
    graphs = found["graphs"]
    assert {size for size in sizes if graphs.get(f"captured {size}")} == set(sizes)
    assert graphs["addresses changed"] == 0 < graphs["replays"]
    assert (graphs["wrapped"], graphs["first"], graphs["last"]) == (5, 1, 1)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Bert of four small layers, with the tokenizer that vLLM wants there."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 512}
    config = BertConfig(**sizes, architectures=["BertModel"])
    path = tmp_path_factory.mktemp("models") / "bert"
    BertModel(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(path)
    return str(path)


def test_an_embedding_model(engine, embedder, tmp_path):
    what = {"model": embedder, "embeds": True, "cache": tmp_path}
    eager = engine(**what, compilation_config={"mode": 0})
    found = engine(**what, compilation_config=OURS)
    for ours, theirs in zip(found["embeddings"], eager["embeddings"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert found["counters"]["num_piecewise_capturable_graphs_seen"] == 5


def test_options_and_dumps(engine, tmp_path, eager):
    config = {**OURS, "compile_ranges_endpoints": [8]}
    own = {"backend": "eager", "debug_dump_path": str(tmp_path / "out")}
    options = {"additional_config": {"piecework": own}}
    found = engine(cache=tmp_path / "cache", compilation_config=config, engine=options)
    same(found, eager)
    assert found["counters"]["num_backend_compilations"] == 10  # two ranges
    assert list((tmp_path / "out").rglob("*stitched*"))


def test_eager_is_left_alone(engine, tmp_path, eager):
    options = {"enforce_eager": True}
    found = engine(cache=tmp_path, compilation_config=OURS, engine=options, prompts=[[16]])
    assert found["tokens"]["16"] == eager["tokens"]["16"]
    assert "num_graphs_seen" not in found["counters"]


APART = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions go to the ranks
}


TWO = {"compilation_config": OURS, "environ": APART, "engine": {"tensor_parallel_size": 2}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def test_tensor_parallel(engine, ranks, eager):
    """Two ranks, in processes of the engine's: what is equal is compiled by one of them, and kept for the next start."""
    found = engine(cache=ranks, ranks=True, **TWO)
    assert found["tokens"] == eager["tokens"]
    counters = Counter()
    for rank in found["ranks"]:
        assert "5 pieces, 3 unique" in rank["reports"]["backbone"]
        counters.update(rank["counters"])
    assert (
        counters["num_inductor_compiles"] == 4
    )  # the first piece has the rank's part of the vocabulary
    assert counters["num_compiled_artifacts_loaded"] == 2


def test_tensor_parallel_warm(engine, ranks, eager):
    warm = engine(cache=ranks, ranks=True, **TWO)
    assert warm["tokens"] == eager["tokens"]
    for rank in warm["ranks"]:
        assert rank["counters"] == {"num_models_seen": 1, "num_aot_artifacts_loaded": 1}


def test_data_parallel(engine, ranks, eager):
    """Two replicas behind one server: each has a number, a cache of its own and the other's pieces."""
    lengths = [1, 3, 16, 40, 90, 120, 2, 7]
    options = {"data_parallel_size": 2}
    kept = {**TWO, "environ": {**APART, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}, "engine": options}
    found = engine(cache=ranks, replicas=True, prompts=lengths, **kept)
    name = ",".join(map(str, lengths))
    assert found["tokens"] == {name: eager["tokens"][name]}
    names = {path.parent.name for path in ranks.rglob("rank_0_[01]/model")}
    assert names == {"rank_0_0", "rank_0_1"}


def test_ranks_that_would_do_something_else_do_not_start(engine, tmp_path):
    different = {**TWO, "environ": {**APART, "RANKS_DIFFER": "1"}}
    found = engine(cache=tmp_path, fails=True, **different)
    assert "would do something else than rank" in found["log"]


def test_a_rank_that_dies_ends_the_engine(engine, tmp_path):
    """While the other one compiles, or waits for it."""
    killed = []

    def kill() -> bool:
        if not killed and list(tmp_path.rglob(".locks")):
            for each in psutil.Process().children(recursive=True):
                named = each.as_dict(["cmdline"])["cmdline"]  # None of one that ended
                if "Worker_TP1" in "".join(named or ()):
                    each.kill()
                    killed.append(time.monotonic())
        return False

    found = engine.start(cache=tmp_path, **TWO)(kill)
    assert found["exit"] != 0, found["log"][-5000:]
    assert killed and time.monotonic() - killed[0] < 120
