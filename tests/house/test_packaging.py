"""What users install and what runs for contributors: in, the tree as it is tracked; out, an sdist, a wheel built from it, that wheel at work elsewhere, and workflows that name what exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from processes import python

import piecework

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
# No part of the package: kept beside it in the repository.
BESIDE = ("tests/", "docs/", "golden/cases/", ".")


def tracked() -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("this is no checkout: what belongs to the project is not known")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def of_the_package() -> set[str]:
    """Files of the packages: below a folder, or a module at the top."""
    names = {name for name in tracked() if not name.startswith(BESIDE)}
    return {name for name in names if name.endswith(".py") or name.count("/")} | {"py.typed"}


def _build(kind: str, source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    done = python("-c", BUILD, f"build_{kind}", target, cwd=source)
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, built from a copy of what is tracked."""
    place = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        (place / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place / "tree" / name)
    archive = _build("sdist", place / "tree", place / "dist")
    with tarfile.open(archive) as file:
        file.extractall(place, filter="data")
    return place / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel, built from the sdist alone."""
    return _build("wheel", sdist, sdist.parent / "dist")


def test_the_sdist_has_what_is_read_beside_the_code(sdist: Path) -> None:
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "constraints.txt"):
        assert (sdist / name).is_file(), name


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        inside = {n for n in file.namelist() if ".dist-info/" not in n}
        points = next(n for n in file.namelist() if n.endswith("entry_points.txt"))
        entry_points = file.read(points).decode()
    not_installed = {n for n in of_the_package() if n.endswith(".ipynb")}
    assert not_installed == {"examples/first_hour.ipynb"}
    assert inside == {f"piecework/{name}" for name in of_the_package() - not_installed}
    assert {"piecework/py.typed", "piecework/templates/module.py.jinja"} <= inside
    assert "piecework = piecework.golden.plugin" in entry_points


USER = """
import importlib.metadata, pathlib, sys
import pytest, torch
import piecework

target = pathlib.Path(sys.argv[1])
assert target in pathlib.Path(piecework.__file__).parents, piecework.__file__
(point,) = importlib.metadata.distribution("piecework").entry_points.select(group="pytest11")
assert target in pathlib.Path(point.load().__file__).parents

class Model(torch.nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x)) + 1

model = Model(4, 4).eval()
config = {"backend": "eager"}
stitched = piecework.compile(model, (torch.randn(3, 4),), splitting_ops=[torch.tanh], config=config)
x = torch.randn(5, 4)
assert torch.equal(stitched(x), model(x)) and "def execution_fn(" in stitched.source.code
pathlib.Path("test_user.py").write_text(
    "def test_golden(stitched_golden):\\n    stitched_golden('def execution_fn(x):\\\\n    return x\\\\n')\\n"
)
assert pytest.main(["-q", "--piecework-update"]) == 1
assert pytest.main(["-q"]) == 0
"""


def test_an_installed_wheel_compiles_a_model_and_has_its_pytest_plugin(
    wheel: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    python(*pip, "--target", target, wheel)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "user.py").write_text(USER)
    python("user.py", target, cwd=tmp_path / "elsewhere", PYTHONPATH=str(target), CI="")


@pytest.mark.nightly
def test_a_clean_environment_with_what_the_wheel_asks_for(wheel: Path, tmp_path: Path) -> None:
    """A new environment that sees the packages of this one, but is its own: scripts, metadata and dependencies are checked by pip."""
    clean = tmp_path / "clean"
    python("-m", "venv", "--system-site-packages", clean)
    theirs = clean / "bin" / "python"
    folders = [p for p in sys.path if p.endswith("site-packages")]
    lib = next((clean / "lib").glob("python*/site-packages"))
    (lib / "these.pth").write_text("\n".join(folders))
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--force-reinstall"]
    subprocess.run([str(theirs), *install, str(wheel)], check=True)
    script = clean / "bin" / "piecework"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    demo = [str(script), "demo", "--backend", "eager"]
    shown = subprocess.run(demo, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert shown.returncode == 0 and "execution_fn" in shown.stdout, shown.stdout + shown.stderr


# --- metadata and workflows ----------------------------------------------------------------------------


def _workflows() -> dict[str, dict[str, dict[str, object]]]:
    folder = ROOT / ".github" / "workflows"
    return {path.name: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yml"))}


def _commands() -> list[str]:
    jobs = [job for flow in _workflows().values() for job in flow["jobs"].values()]
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_workflows_run_what_the_project_has() -> None:
    commands = _commands()
    targets = [command.split()[1:] for command in commands if command.startswith("make ")]
    assert ["lint"] in targets and ["test"] in targets
    for words in targets:
        subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
    for command in commands:
        assert command.startswith(("make ", "python -m ", ".venv/bin/", "gh release create "))
    assert sum(" -m nightly" in command for command in commands) == 1
    assert "nightly: " in "\n".join(PROJECT["tool"]["pytest"]["ini_options"]["markers"])
    extras = {name for command in commands for name in re.findall(r"\.\[(\w+)\]", command)}
    assert extras and extras <= set(PROJECT["project"]["optional-dependencies"])


def test_the_matrix_is_what_the_metadata_claims() -> None:
    matrix = _workflows()["test.yml"]["jobs"]["versions"]["strategy"]["matrix"]
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert matrix["python"] == claimed
    assert PROJECT["project"]["requires-python"] == f">={claimed[0]}"
    (pin,) = (d for d in PROJECT["project"]["dependencies"] if d.startswith("torch"))
    low, high = (int(found) for found in re.findall(r"2\.(\d+)", pin))
    assert matrix["torch"] == [f"2.{minor}" for minor in range(low, high)]
    assert torch.__version__.rpartition(".")[0] in matrix["torch"]


def test_a_release_is_tested_and_named_by_its_version() -> None:
    flow = _workflows()["release.yml"]
    commands = [step["run"] for step in flow["jobs"]["release"]["steps"] if "run" in step]  # type: ignore[attr-defined]
    assert commands[:2] == ["make lint", "make test"]
    compared = [each for each in commands if "GITHUB_REF_NAME" in each and "__version__" in each]
    built, published = commands.index("python -m build --outdir dist"), len(commands) - 1
    assert commands.index(*compared) < built < published
    assert commands[published].startswith("gh release create ") and "dist/*" in commands[published]
    assert PROJECT["project"]["version"] == piecework.__version__


def test_hooks_are_the_checks_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    made = [line.partition("$(BIN)/")[2].split() for line in makefile.splitlines()]
    hooked = [hook["entry"].partition(".venv/bin/")[2].split() for hook in hooks]
    assert [words[0] for words in hooked] == [words[0] for words in made if words]
    assert hooked[2] == made[-1]
    assert all(hook["language"] == "system" for hook in hooks)


# --- the notebook --------------------------------------------------------------------------------------


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((ROOT / "examples" / "first_hour.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    monkeypatch.chdir(tmp_path)
    module = ModuleType("first_hour_notebook")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"<{cell['id']}>", "exec"), vars(module))
            printed[cell["id"]] = capsys.readouterr().out
    assert "def execution_fn(" in printed["compile"] and "def replay(" in printed["captured"]
    assert "~ submod_4 computes something else" in printed["changed"]
    assert list(tmp_path.iterdir()) == []
