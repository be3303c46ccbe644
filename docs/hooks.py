"""What mkdocs needs to know of a checkout. In: the configuration and the pages of docs/. Out: the root's pages too, links that fit the site, and a package to read.

It reads files and imports nothing of piecework.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
#: Pages of the site that lie at the root of the checkout.
AT_ROOT = {
    "index.md": "README.md",
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "LICENSE.md": "LICENSE",
}
EXAMPLES = "examples.md"
#: Where a link to a file of the root leads on the site.
ELSEWHERE = {"README.md": "index.md", "LICENSE": "LICENSE.md", "CONTRIBUTING.md": "contributing.md"}
#: Pages of which nobody looks for a word: long tables, the license.
NOT_SEARCHED = ("models.md", "LICENSE.md")

_package = tempfile.TemporaryDirectory(prefix="piecework-docs-")


@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show the checkout under the name that it is imported by, whatever its folder is called."""
    link = Path(_package.name) / "piecework"
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)
    handlers = config.plugins["mkdocstrings"].config["handlers"]  # type: ignore[index]
    handlers["python"]["paths"] = [_package.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    for name, source in AT_ROOT.items():
        text = (ROOT / source).read_text("utf-8")
        if source == "LICENSE":
            text = f"# License\n\n```text\n{text}```\n"
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, EXAMPLES, content=_examples()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are right in the repository, made right for the site; and what its search leaves out."""
    if page.file.src_uri in NOT_SEARCHED:
        page.meta["search"] = {"exclude": True}

    def inside(match: re.Match[str]) -> str:
        target = match[1].removeprefix("../").removeprefix("docs/")
        if target.startswith("examples/") and target.endswith(".py"):
            target = f"{EXAMPLES}#{Path(target).stem}"
        return f"]({ELSEWHERE.get(target, target)})"

    return re.sub(r"\]\(((?!https?:|#)[^)\s]+)\)", inside, markdown)


def _examples() -> str:
    """One page with every program of examples/."""
    programs = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")
    parts = ["# Examples\n\nWhole programs, as they lie in `examples/`.\n"]
    for path in programs:
        text = path.read_text("utf-8")
        parts.append(
            f'## {path.name} {{#{path.stem}}}\n\n```python title="examples/{path.name}"\n{text}```\n'
        )
    return "\n".join(parts)
