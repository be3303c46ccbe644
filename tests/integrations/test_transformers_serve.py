"""transformers' OpenAI-style server with a stitched model: over HTTP the eager model's tokens."""

from __future__ import annotations

import gc
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from processes import python
from small_llms import build
from typer.testing import CliRunner, Result

from piecework.cli import app
from piecework.errors import UsageError
from piecework.runtime.counters import counters

transformers = pytest.importorskip("transformers")
openai = pytest.importorskip("openai")
for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package)
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from piecework.integrations.transformers import openai_server as served_by  # noqa: E402
from piecework.integrations.transformers import stitch, stitched_module  # noqa: E402

# One word a token; transformers finds out by "abcdef" how the tokens of stop strings are written.
WORDS = ["<unk>", "<s>", "</s>", "abcdef", *(f"w{n}" for n in range(93))]
NAME = "tiny"
COMPILED, HERE = "compiled", "compiled_here"
PROMPT = "w5 w60 w7"
TOGETHER = {"page_size": 8, "num_blocks": 256, "max_batch_tokens": 64, "max_requests_per_batch": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of seeded weights, with a tokenizer of a word a token; beside it, what ``piecework compile`` makes of it."""
    place = tmp_path_factory.mktemp("serve") / "model"
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role == 'user' and 'w1' or 'w2' }} {{ m.content }} {% endfor %}w3"
    tokenizer.save_pretrained(place)
    model = build(num_hidden_layers=1, max_position_embeddings=2048)
    assert model.config.vocab_size == len(WORDS)
    model.save_pretrained(place)
    made = place.with_name(COMPILED)
    # In a process of its own: what other tests leave in this one is in an artifact's key.
    python("-m", "piecework", "compile", place, "-o", made, "--backend", "eager")
    shutil.copytree(made, place.with_name(HERE))
    loaded(place)  # before a model serves: transformers changes classes while it loads another
    return place


@cache
def loaded(folder: Path) -> tuple[torch.nn.Module, object]:
    """The eager model, and its tokenizer."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder), served_by.tokenizer_of(folder)


def stitched(folder: Path, **how: object) -> tuple[torch.nn.Module, object]:
    """The model by its artifact, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    place = folder.with_name(HERE) / "artifact"  # made again where this process differs
    stitch(model, config={"backend": "eager"}, artifact=place, **how)
    return model, served_by.tokenizer_of(folder)


def expected(folder: Path, prompt: str, count: int, **how: object) -> str:
    """What the eager model says."""
    model, tokenizer = loaded(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False, **how)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass
class Running:
    """A server: its port, and its model where that is in this process."""

    port: int
    model: Callable[[], torch.nn.Module | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self):  # type: ignore[no-untyped-def]
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def steps(self) -> int:
        """Forwards of the stitched decoder so far."""
        return sum(row.calls for row in stitched_module(self.model()).call_report())


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether it does once the threads that were told to end, or have answered, came to it."""
    end = time.monotonic() + 60
    gc.collect()
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
        gc.collect()
    return True


@contextmanager
def serving(folder: Path, batching: object = None) -> Iterator[Running]:
    made = []

    def make() -> tuple[torch.nn.Module, object]:
        model, tokenizer = stitched(folder, capture=[1, 2])
        made.append(weakref.ref(model))
        return model, tokenizer

    server = served_by.make_server(NAME, make, batching=batching)
    listener = served_by.bound_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(listener.getsockname()[1], lambda: made[-1]())
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module", params=[None, TOGETHER], ids=["one by one", "together"])
def running(request: pytest.FixtureRequest, folder: Path) -> Iterator[Running]:
    pages = request.param and transformers.ContinuousBatchingConfig(**request.param)
    with serving(folder, pages) as found:
        yield found


def fetch(url: str, body: bytes | None = None) -> str:
    """What the server answers: to a GET, or, with a body, to a POST."""
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return answer.read().decode()


def complete(running: Running, prompt: str, count: int, **more: object) -> str:
    asked = {"model": NAME, "prompt": prompt, "max_tokens": count, "temperature": 0, **more}
    answer = running.client().completions.create(**asked)
    if not more.get("stream"):
        assert answer.usage.completion_tokens == count
        return answer.choices[0].text
    return "".join(chunk.choices[0].text for chunk in answer)


def chat(running: Running, prompt: str, count: int, *, stream: bool) -> str:
    asked = {"model": NAME, "messages": [{"role": "user", "content": prompt}], "stream": stream}
    answer = running.client().chat.completions.create(max_tokens=count, temperature=0, **asked)
    if not stream:
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


def test_answers_are_those_of_the_eager_model(running: Running, folder: Path) -> None:
    with counters.expect(num_graphs_seen=0, num_backend_compilations=0):
        for stream in (False, True):
            before = running.steps()
            assert complete(running, PROMPT, 9, stream=stream) == expected(folder, PROMPT, 9)
            assert running.steps() - before >= 9  # a step of the stitched model for each token
            ours = chat(running, PROMPT, 12, stream=stream)
            assert ours == expected(folder, f"w1 {PROMPT} w3", 12)


def test_two_at_once(running: Running, folder: Path) -> None:
    """Of several lengths, and one that is given up in the middle."""
    asked = [("w4 " + f"w{n} " * (2 * n), 20 + n, n % 2 == 0) for n in range(1, 5)]
    with ThreadPoolExecutor(2) as pool:
        ours = pool.map(lambda a: complete(running, a[0], a[1], stream=a[2]), asked)
        how = {"model": NAME, "prompt": PROMPT, "max_tokens": 90, "stream": True}
        with running.client().completions.create(**how) as given_up:
            next(iter(given_up))
        assert [*ours] == [expected(folder, prompt, count) for prompt, count, _ in asked]


def test_a_wrong_name_is_refused(running: Running, folder: Path) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        running.client().completions.create(model="other", prompt=PROMPT)
    assert "other" in refused.value.message
    assert "no other model" in fetch(f"{running.url}/load_model", b'{"model": "other"}')
    assert [each.id for each in running.client().models.list()] == [NAME]
    assert complete(running, PROMPT, 3) == expected(folder, PROMPT, 3)


def test_metrics_are_answered(running: Running) -> None:
    complete(running, PROMPT, 3)
    text = fetch(f"{running.url}/metrics")
    counted = [line for line in text.splitlines() if line.startswith("piecework_steps_total")]
    assert any(f'model="{NAME}",mode="PIECEWISE"' in line for line in counted)


def test_a_model_that_was_unloaded_is_stitched_again_and_shutdown_leaves_nothing(
    folder: Path,
) -> None:
    threads = set(threading.enumerate())
    with serving(folder) as running:
        first = weakref.ref(running.model())
        assert fetch(f"{running.url}/reset", b"") == '{"status":"ok"}'
        with counters.expect(num_graphs_seen=1):  # the head; the decoder comes from its artifact
            assert complete(running, PROMPT, 9) == expected(folder, PROMPT, 9)
        assert running.steps() == 9
        assert complete(running, PROMPT, 5, stream=True) == expected(folder, PROMPT, 5)
        assert running.model() is not first()
        asked = {"generation_config": '{"output_hidden_states": true}'}
        with pytest.raises(openai.BadRequestError, match="output_hidden_states is asked for"):
            running.client().completions.create(model=NAME, prompt=PROMPT, extra_body=asked)
    assert comes_true(lambda: first() is None and running.model() is None)
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", running.port)):
        pass
    left = [each for each in set(threading.enumerate()) - threads if not each.daemon]
    for each in left:
        each.join(60)
    assert not any(each.is_alive() for each in left), left


def test_the_command_serves_what_compile_made(folder: Path) -> None:
    made = folder.with_name(COMPILED)
    kept = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    command = [sys.executable, "-m", "piecework", "serve", str(made), "--port", "0"]
    with subprocess.Popen(
        [*command, "--name", NAME], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            lines = iter(process.stdout.readline, "")
            said = []
            for line in lines:
                said.append(line)
                if "startup complete" in line:
                    break
            found = re.search(rf"{NAME} at http://127.0.0.1:(\d+)/v1", "".join(said))
            assert found, "".join(said)
            running = Running(int(found[1]), lambda: None)
            assert chat(running, PROMPT, 6, stream=True) == expected(folder, f"w1 {PROMPT} w3", 6)
            text = fetch(f"{running.url}/metrics")
            assert f'piecework_traces{{model="{NAME}"}} 1' in text
            assert "piecework_graphs_seen_total 0" in text  # loaded, not traced
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert kept == {path: path.stat().st_mtime_ns for path in made.rglob("*")}


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, args)])


def test_what_can_not_be_served_is_refused_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from piecework.integrations import protocol

    absent = {"fastapi", "openai"}
    with monkeypatch.context() as here:
        here.setattr(protocol, "find_spec", lambda name: None if name in absent else name)
        result = invoke(folder, "--port", 0)
    assert result.exit_code == 2 and "Loading" not in result.output
    assert "needs fastapi, openai" in result.output and "piecework[serve]" in result.output
    result = invoke(folder, "--cb-num-blocks", 8)
    assert result.exit_code == 2 and "--continuous-batching" in result.output
    with served_by.bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        result = invoke(folder, "--port", taken.getsockname()[1])
    assert result.exit_code == 2 and "can't listen" in result.output
    with pytest.raises(UsageError, match="can't load a tokenizer"):
        served_by.tokenizer_of(tmp_path)
    result = invoke(folder / "config.json", "--port", 0)
    assert result.exit_code == 2 and "no model that has a tokenizer" in result.output
