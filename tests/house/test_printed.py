"""What `compile`, `stitch` and `serve` print, on a terminal and off it, kept as text beside this file.

With ``PRINTED=accept`` in the environment the texts are written anew; review them in the diff.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest

TEXTS = Path(__file__).with_name("printed")
WIDTH = 160  # wide enough that no number of digits moves a line's end
MODEL = """
import torch
import piecework

@piecework.splitting_op("printed::mix")
def mix(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@mix.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)

class Mixing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.last(mix(self.first(x)) if x.shape[0] > 1 else x)

def make():
    return Mixing(), (torch.randn(2, 4),)
"""
FUNCTION = """
import torch
import piecework
from printed_model import make
from piecework.runtime.observe import progress

progress.PATIENCE = 0.0  # as if it took long
model, args = make()
stitched = piecework.compile(model, args, config={"backend": "eager"})
stitched(torch.randn(1, 4))
stitched.capture([2])
"""
STITCH = """
import transformers
from piecework.integrations.transformers import stitch
from piecework.runtime.observe import progress

progress.PATIENCE = 0.0  # as if it took long
model = transformers.AutoModelForCausalLM.from_pretrained("MODEL")
stitch(model, config={"backend": "eager"}, capture=[1])
"""
# Escapes, the frames of a spinner, and what another run or machine says otherwise.
_OTHERWISE = (
    (re.compile(r"\x1b\[[?\d;]*[A-Za-z]|[⠀-⣿] ?"), ""),
    (re.compile(r"\d+\.\d+\s?s\b"), "… s"),
    (re.compile(r"\d+:\d\d:\d\d|-:--:--"), "…"),
    (re.compile(r"http://127.0.0.1:\d+"), "http://127.0.0.1:…"),
    (re.compile(r"(/\S*)?/tmp\S*/"), ".../"),
    (re.compile(r"[━╸╺]{3,}"), "━━━"),
    (re.compile(r"[ \t]+$", re.MULTILINE), ""),
)


def printed(command: Sequence[str], folder: Path, *, terminal: bool, until: str = "") -> str:
    """Each line that a command shows, once where it is drawn again; it is interrupted at ``until``."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    seen, stopped = b"", False
    env = os.environ | {"COLUMNS": str(WIDTH), "TQDM_DISABLE": "1"}  # transformers' bars
    with subprocess.Popen(command, cwd=folder, stdout=writer, stderr=writer, env=env) as process:
        os.close(writer)
        # How Linux says that nobody writes to a terminal any more.
        with contextlib.suppress(OSError):
            while part := os.read(reader, 1 << 16):
                seen += part
                if until and until.encode() in seen and not stopped:
                    process.send_signal(signal.SIGINT)
                    stopped = True
    os.close(reader)
    assert process.returncode == 0, seen.decode()
    text = seen.decode().replace(str(folder), "FOLDER")
    for pattern, plain in _OTHERWISE:
        text = pattern.sub(plain, text)
    lines = [each for each in re.split(r"[\r\n]+", text) if each.strip()]
    lines = [each for each in lines if not each.startswith("INFO:")]  # of transformers' server
    return "\n".join(dict.fromkeys(lines)) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("printed")
    (place / "printed_model.py").write_text(MODEL)
    (place / "function.py").write_text(FUNCTION)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    for needed in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(needed)
    from small_llms import build
    from tokenizers import Tokenizer, models

    place = folder / "model"
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(place)
    build(num_hidden_layers=1).save_pretrained(place)
    (folder / "stitching.py").write_text(STITCH.replace("MODEL", str(place)))
    return place


def piecework(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "piecework", *arguments]


def check(name: str, text: str) -> None:
    """Compare with the text that is kept."""
    kept = TEXTS / f"{name}.txt"
    if os.environ.get("PRINTED") == "accept":
        kept.write_text(text, "utf-8")
    assert text == kept.read_text("utf-8")


WHERE = {True: "terminal", False: "plain"}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("what", "terminal"),
    [("command", True), ("command", False), ("function", False), ("function", True)],
)
def test_compile(folder: Path, what: str, terminal: bool) -> None:
    made = ("--backend", "eager", "-o", WHERE[terminal])
    command = {
        "command": piecework("compile", "printed_model:make", *made),
        "function": [sys.executable, "function.py"],
    }
    text = printed(command[what], folder, terminal=terminal)
    check(f"compile_{what}_{WHERE[terminal]}", text)


@pytest.mark.sample(2)
@pytest.mark.parametrize("terminal", [True, False])
def test_stitch(folder: Path, model: Path, terminal: bool) -> None:
    text = printed([sys.executable, "stitching.py"], folder, terminal=terminal)
    check(f"stitch_{WHERE[terminal]}", text)


@pytest.mark.sample(2)
@pytest.mark.parametrize("terminal", [False, True])
def test_serve_compiles_once_and_loads_then(folder: Path, model: Path, terminal: bool) -> None:
    command = piecework(
        *("serve", str(model), "--artifact", f"kept_{WHERE[terminal]}", "--backend", "eager"),
        *("--port", "0", "--name", "tiny"),
    )
    texts = [
        printed(command, folder, terminal=terminal, until="startup complete") for _ in range(2)
    ]
    check(f"serve_{WHERE[terminal]}", "\n".join(texts))
