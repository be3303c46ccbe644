"""``/v1/embeddings`` over HTTP: the eager encoder's mean states, and errors that say which part of a request is wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from piecework.errors import UsageError
from piecework.integrations.loading import load_model
from piecework.runtime.config.compilation import CompilationConfig

transformers = pytest.importorskip("transformers")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from piecework.integrations.encoders.embeddings import (  # noqa: E402
    Embedder,
    make_embedding_server,
)
from piecework.integrations.transformers.openai_server import bound_socket  # noqa: E402

EAGER = CompilationConfig(backend="eager")
TEXTS = ["w5 w60 w7", "w1", "w9 w8 w7 w6 w5"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[object, torch.nn.Module]]:
    """A client of a small BERT's server, and the eager model."""
    folder = tmp_path_factory.mktemp("bert") / "model"
    vocabulary = ["[PAD]", "[UNK]", *(f"w{n}" for n in range(97))]
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    eager = transformers.BertModel(config).eval()
    eager.save_pretrained(folder)
    loaded = load_model(str(folder))
    server = make_embedding_server("bert", Embedder(loaded.stitch(EAGER), tokenizer, loaded))
    with bound_socket("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        listener.listen()
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0), eager
        server.should_exit = True
        thread.join(60)
    with pytest.raises(UsageError, match="embeddings are of texts"):
        Embedder(loaded, lambda text: {"pixel_values": text}, loaded)


@torch.no_grad()
def mean_states(eager: torch.nn.Module, text: str) -> list[float]:
    ids = torch.tensor([[int(word[1:]) + 2 for word in text.split()]])
    return eager(ids).last_hidden_state[0].mean(0).tolist()


def test_embeddings_are_the_eager_models(served: tuple[object, torch.nn.Module]) -> None:
    client, eager = served
    assert [each.id for each in client.models.list()] == ["bert"]
    for form in ("float", "base64"):
        got = client.embeddings.create(model="bert", input=TEXTS, encoding_format=form)
        assert got.usage.prompt_tokens == 9 and [each.index for each in got.data] == [0, 1, 2]
        if form == "float":
            vectors = [each.embedding for each in got.data]
            torch.testing.assert_close(
                torch.tensor(vectors), torch.tensor([mean_states(eager, t) for t in TEXTS])
            )
    one = client.embeddings.create(model="bert", input=TEXTS[0])  # base64, read by the client
    torch.testing.assert_close(
        torch.tensor(one.data[0].embedding), torch.tensor(mean_states(eager, TEXTS[0]))
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"input": ["w1", ""]}, "a list of texts"),
        ({"input": [5, 6]}, "a list of texts"),
        ({"input": " ".join(["w1"] * 25)}, "positions for 24"),
        ({"input": "w1", "dimensions": 4}, "dimensions"),
        ({"input": "w1", "model": "other"}, "model"),
    ],
)
def test_what_can_not_be_embedded_is_told(
    served: tuple[object, torch.nn.Module], asked: dict[str, object], said: str
) -> None:
    client, _ = served
    with pytest.raises(openai.BadRequestError, match=said):
        client.embeddings.create(**{"model": "bert", **asked})
