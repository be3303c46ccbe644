"""One command for a bare machine with a GPU: in, a plain checkout and a folder of wheels.

    python bench/on_gpu.py --out results --wheels wheels

It needs Python 3.12, torch, Triton, transformers, pytest and jinja2, and no network. Nothing is installed: wheels are unpacked into a
temporary folder, beside a link that gives the checkout its name. What answers most runs first, each file of tests and each part in a
process of its own, and whatever ends keeps its results: ``gpu_tests.txt``, ``gpu.jsonl``, ``gpu_bench.txt``, ``gpu_profile.txt`` and, where
compute-sanitizer is installed, ``gpu_sanitizer.txt``. ``--only`` runs some of it; ``--device cpu`` rehearses all of it at a tiny scale.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What is run, what answers most first → the most seconds that it may take; together less than there are.
LIMITS = {
    "tests:smoke": 60,
    "whole": 70,
    "tests:main": 130,
    "steps": 70,
    "transformers": 55,
    "inductor": 45,
    "staging": 25,
    "profile": 20,
    "tests:graphs": 30,
    "capture": 35,
    "vllm": 20,
}
# Run only by name: they take the time of others.
MORE = {"sanitizer": 90, "deep": 150}
SECONDS = 570
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
# What black imports and formatting text never uses, for a machine that has no more than the wheels.
STAND_INS = {
    "mypy_extensions": {
        "mypy_extensions.py": "def mypyc_attr(*args, **kwargs):\n    return lambda each: each\n\n\ntrait = mypyc_attr()\n"
    },
    "pathspec": {
        "pathspec/__init__.py": "class PathSpec:\n    pass\n\n\nGitIgnoreSpec = PathSpec\n",
        "pathspec/patterns/__init__.py": "",
        "pathspec/patterns/gitwildmatch.py": "class GitWildMatchPatternError(Exception):\n    pass\n",
        "pathspec/patterns/gitignore/__init__.py": "class GitIgnorePatternError(Exception):\n    pass\n",
    },
}
NEEDED = ("torch", "triton", "pytest", "jinja2", "pydantic", "black", "rich", "typer", "filelock")


class Runner:
    """Runs one thing after the other until the time is up.

    Args:
        out: where results go.
        folder: holds the link to the checkout and what wheels had.
        device: ``cuda`` or ``cpu``.
        seconds: for everything together.
    """

    def __init__(self, out: Path, folder: Path, device: str, seconds: float) -> None:
        self.out, self.device = out, device
        self.end = time.monotonic() + seconds
        self.clean = True
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "wheels")]),
            "PIECEWORK_TEST_DEVICE": device,
            "PIECEWORK_CACHE_DIR": str(folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "HF_HOME": str(folder / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        (folder / "cache").mkdir(mode=0o700)

    def run(self, name: str, command: Sequence[str], file: str, most: float) -> None:
        """Run ``command``, what it prints added to ``file``."""
        # A rehearsal compiles C++, on fewer cores.
        left = min(most * (6 if self.device == "cpu" else 1), self.end - time.monotonic())
        if left < 10:
            self._say(name, file, "no time left")
            self.clean = False
            return
        start = time.monotonic()
        with (self.out / file).open("ab") as sink:
            sink.write(f"\n=== {name}\n".encode())
            sink.flush()
            try:
                code: object = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=self.environment,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    timeout=left,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"cut off after {left:.0f} s"
        self.clean &= code == 0
        self._say(name, file, f"exit {code}, {time.monotonic() - start:.0f} s")

    def _say(self, name: str, file: str, text: str) -> None:
        print(f"{name}: {text}", flush=True)
        with (self.out / file).open("a", encoding="utf-8") as sink:
            sink.write(f"=== {name}: {text}\n")

    def tests(self, name: str) -> None:
        command = [*PYTEST, "-rs", "-v", f"tests/gpu/test_gpu_{name}.py"]
        self.run(f"tests {name}", command, "gpu_tests.txt", LIMITS[f"tests:{name}"])

    def part(self, name: str) -> None:
        most = {**LIMITS, **MORE}[name]
        module = [sys.executable, "-m", "piecework.bench.gpu"]
        command = [*module, "--part", name, "--out", str(self.out)]
        command += ["--device", self.device, "--seconds", str(most * 0.8)]
        command += ["--quick"] if self.device == "cpu" else []
        self.run(f"part {name}", command, "gpu_bench.txt", most)

    def sanitizer(self) -> None:
        """The tests of workspaces once more, each access to memory checked."""
        tool = shutil.which("compute-sanitizer")
        if tool is None or self.device == "cpu":
            return
        command = [tool, "--tool", "memcheck", "--target-processes", "application-only"]
        command += [*PYTEST, "-q", "tests/gpu/test_gpu_main.py"]
        command += ["-k", "workspace and not reduce_overhead"]
        self.run("sanitizer", command, "gpu_sanitizer.txt", MORE["sanitizer"])


def unpack(wheels: Path | None, folder: Path) -> None:
    """The checkout under its name, and what the wheels hold, in ``folder``."""
    (folder / "piecework").symlink_to(ROOT, target_is_directory=True)
    target = folder / "wheels"
    target.mkdir()
    for wheel in [] if wheels is None else sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()
    for name, files in STAND_INS.items():
        if importlib.util.find_spec(name) is None:
            for file, text in files.items():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything, or what ``--only`` names."""
    everything = [*LIMITS, *MORE]
    parser = argparse.ArgumentParser(prog="python bench/on_gpu.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to unpack")
    parser.add_argument("--only", nargs="+", choices=everything, default=list(LIMITS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="piecework-gpu-") as name:
        folder = Path(name)
        unpack(options.wheels, folder)
        missing = [each for each in NEEDED if importlib.util.find_spec(each) is None]
        if missing:
            print(
                f"missing: {', '.join(missing)}; give wheels of them with --wheels", file=sys.stderr
            )
            return 2
        if options.device == "cuda" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
            print("no C compiler is on PATH: Triton can launch nothing", file=sys.stderr)
        runner = Runner(options.out.resolve(), folder, options.device, options.seconds)
        for each in options.only:
            if each == "sanitizer":
                runner.sanitizer()
            elif each.startswith("tests:"):
                runner.tests(each.removeprefix("tests:"))
            else:
                runner.part(each)
    return 0 if runner.clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
