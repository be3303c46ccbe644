"""A process that uses the cache, started by the fault tests. In: a mode, a directory and numbers. Out: one JSON line.

It never imports torch: the packages above the cache are stood in for by empty ones with the same search path, so that
many of these start in a moment whatever `import piecework` pulls in. What the cache warns of is on the error output.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
import types
from functools import partial
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    for place in ("piecework", "piecework.runtime"):
        sys.modules[place] = types.ModuleType(place)
        sys.modules[place].__path__ = [str(PACKAGE.joinpath(*place.split(".")[1:]))]

from piecework.runtime.store.cache import open_entry  # noqa: E402
from piecework.runtime.store.factors import KeyFactors  # noqa: E402

FACTORS = KeyFactors({"config": {"dtype": "bf16"}})


def payload(name: str) -> bytes:
    """The only right bytes for a name; of different sizes, all over 30 kB."""
    block = hashlib.sha256(name.encode()).digest()
    return block * (1000 + block[0])


def use(root: str, count: int) -> dict[str, object]:
    """Open, get or compile, write texts; report what came of it."""
    entry = open_entry(root, FACTORS)
    compiled: list[str] = []

    def compile_fn(name: str) -> bytes:
        compiled.append(name)
        return payload(name)

    names = [f"piece {index}" for index in range(count)]
    results = [entry.get_or_compile(name, partial(compile_fn, name)) for name in names]
    return {
        "right": [result.data for result in results] == [*map(payload, names)],
        "compiled": compiled,
        "saved": [result.saved for result in results],
        "texts_saved": entry.write_texts({"stitched.py": "x = 1\n" * 4000}),
    }


def share(root: str, count: int) -> dict[str, object]:
    """Like `use` once the input has ended."""
    print("ready", flush=True)
    sys.stdin.read()
    return use(root, count)


def hold(root: str) -> None:
    """Compile, and never come to an end."""
    say = lambda: (print("begin", flush=True), time.sleep(600))  # noqa: E731
    open_entry(root, FACTORS).get_or_compile("slow", say)


def save_and_die(root: str, count: int, step: int) -> None:
    """Save artifacts and texts, and SIGKILL itself at a file-system operation: every instant in turn, none by chance."""
    moves = {"os.rename", "os.remove", "os.mkdir", "os.listdir", "os.utime"}
    watched = {"open", "fcntl.flock", *moves}
    seen = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in watched and root in str(arguments):
            seen[0] += 1
            if seen[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    entry = open_entry(root, FACTORS)
    for name in (f"piece {index}" for index in range(count)):
        entry.get_or_compile(name, partial(payload, name))
        entry.write_texts({"stitched.py": f"# after {name}\n" * 50})


def use_with_small_files(root: str, count: int, limit: int) -> dict[str, object]:
    """Like `use` where no file may grow beyond `limit` bytes: the kernel refuses the write half-way."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return use(root, count)


def use_as_nobody(root: str, count: int) -> dict[str, object]:
    """Like `use` after giving up root: permissions then count, also those of Python's own files."""
    import filelock  # noqa: F401

    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    return use(root, count)


if __name__ == "__main__":
    mode, root, *numbers = sys.argv[1:]
    print(json.dumps(globals()[mode](root, *map(int, numbers))))
    assert "torch" not in sys.modules
