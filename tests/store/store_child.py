"""A process that uses the cache, started by the fault tests. In: a mode and a directory. Out: exit code 0 and one JSON line.

It never imports torch: the packages above the cache are stood in for by empty ones with the same search path, so that
many of these start in a moment whatever `import piecework` pulls in.
"""

import hashlib
import json
import logging
import os
import resource
import signal
import sys
import types
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]


def stand_in(name: str, path: Path) -> None:
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


stand_in("piecework", PACKAGE)
stand_in("piecework.runtime", PACKAGE / "runtime")

from piecework.runtime.store.cache import open_entry  # noqa: E402
from piecework.runtime.store.factors import KeyFactors  # noqa: E402

FACTORS = KeyFactors({"config": {"dtype": "bf16"}})


def payload(name: str) -> bytes:
    """The only right bytes for a name; of different sizes, all over 30 kB."""
    block = hashlib.sha256(name.encode()).digest()
    return block * (1000 + block[0])


class Warnings(logging.Handler):
    """Collects what the cache warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("piecework").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def compile_and_count(name: str, journal: str) -> bytes:
    """Append one line to `journal`, atomically, for each compile that really happens."""
    descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{name}\n".encode())
    os.close(descriptor)
    return payload(name)


def share(root: str, journal: str, count: int) -> dict[str, object]:
    """Say that it is ready, wait for the end of the input, then get or compile `count` artifacts."""
    warnings = Warnings()
    print("ready", flush=True)
    sys.stdin.read()
    entry = open_entry(root, FACTORS)
    right = all(
        entry.get_or_compile(name, lambda name=name: compile_and_count(name, journal)).data
        == payload(name)
        for name in (f"piece {index}" for index in range(count))
    )
    right = right and entry.write_texts({"stitched.py": "def execution_fn(): ...\n"})
    return {"right": right, "warnings": warnings.texts}


def save(root: str, count: int) -> dict[str, object]:
    """Save artifacts and texts one after the other, telling the parent when it begins."""
    print("begin", flush=True)
    entry = open_entry(root, FACTORS)
    for index in range(count):
        name = f"piece {index}"
        entry.get_or_compile(name, lambda name=name: payload(name))
        entry.write_texts({"stitched.py": f"# after {name}\n" * 50})
    return {"saved": count}


def save_and_die(root: str, count: int, step: int) -> dict[str, object]:
    """Like `save`, but SIGKILL itself at the given file-system operation: every instant in turn, none by chance."""
    watched = {
        "open",
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.listdir",
        "os.utime",
        "fcntl.flock",
    }
    seen = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in watched and root in str(arguments):
            seen[0] += 1
            if seen[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return save(root, count)


def use(root: str, count: int) -> dict[str, object]:
    """Open, get or compile, write texts; report what came of it."""
    warnings = Warnings()
    entry = open_entry(root, FACTORS)
    results = [
        (name, entry.get_or_compile(name, lambda name=name: payload(name)))
        for name in (f"piece {index}" for index in range(count))
    ]
    texts_saved = entry.write_texts({"stitched.py": "x = 1\n" * 4000})
    return {
        "right": all(result.data == payload(name) for name, result in results),
        "compiled": [result.compiled for _, result in results],
        "saved": [result.saved for _, result in results],
        "texts_saved": texts_saved,
        "warnings": warnings.texts,
    }


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


def main() -> int:
    mode, root, *rest = sys.argv[1:]
    functions = {
        "share": lambda: share(root, rest[0], int(rest[1])),
        "save": lambda: save(root, int(rest[0])),
        "save_and_die": lambda: save_and_die(root, int(rest[0]), int(rest[1])),
        "use": lambda: use(root, int(rest[0])),
        "use_with_small_files": lambda: use_with_small_files(root, int(rest[0]), int(rest[1])),
        "use_as_nobody": lambda: use_as_nobody(root, int(rest[0])),
    }
    print(json.dumps(functions[mode]()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
