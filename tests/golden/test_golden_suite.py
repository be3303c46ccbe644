"""`piecework golden` in somebody else's repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import piecework
from piecework.golden import check

SOURCE = """# __vllm_submods__:
#   [0] submod_0  {digest}

def execution_fn(x, *, __vllm_submods__):
    y = __vllm_submods__[0](x)
    return y
"""


def _model(place: Path, digest: str) -> None:
    text = SOURCE.format(digest=digest)
    (place / "acme_models" / "model.py").write_text(f"SOURCE = {text!r}\n")


def _repository(place: Path) -> None:
    (place / "acme_models").mkdir()
    (place / "acme_models" / "__init__.py").touch()
    _model(place, "aaaa")


def _golden(place: Path, *arguments: str, ci: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``piecework golden`` as its console script does: the working folder is not on the path."""
    code = "import sys; from piecework.cli import main; sys.path[:] = [p for p in sys.path if p]; main()"
    parent = str(Path(piecework.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code, "golden", *arguments],
        cwd=place,
        env={**os.environ, "CI": ci, "PYTHONPATH": parent},
        capture_output=True,
        text=True,
        check=False,
    )


CASE = """
from acme_models.model import SOURCE

def texts():
    return {"entry": SOURCE}
"""


def test_cases_import_packages_of_the_working_folder(tmp_path: Path) -> None:
    _repository(tmp_path)
    case = tmp_path / "golden" / "cases" / "acme"
    case.mkdir(parents=True)
    (case / "graph.py").write_text(CASE)
    updated = _golden(tmp_path, "update")
    assert updated.returncode == 1, updated.stdout + updated.stderr
    assert (case / "expected_entry.py").is_file()


def test_an_empty_folder_has_nothing_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "__file__", str(tmp_path / "site" / "golden" / "check.py"))
    assert check.default_root() is None
