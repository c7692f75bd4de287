"""What `mkdocs build` adds to the pages of this folder: files from beside it, and a page of API reference per room."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
COPIED = [
    *sorted((ROOT / "benchmarks/results").iterdir()),
    *sorted((ROOT / "benchmarks/learning_curves").glob("*.toml")),
    ROOT / "LICENSE",
    ROOT / "pyproject.toml",
]


def rooms() -> list[str]:
    """The packages and the public single modules of segqc."""
    packages = sorted(folder.parent.name for folder in (ROOT / "segqc").glob("*/__init__.py"))
    modules = sorted(file.stem for file in (ROOT / "segqc").glob("[!_]*.py"))
    return [*packages, *modules]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the last section of the navigation."""
    config.nav[-1]["API reference"] = [{room: f"reference/{room}.md"} for room in rooms()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere or are generated, and the results that pages link to."""
    for uri, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=re.sub(r"\]\(docs/", "](", text)))
    for room in rooms():
        files.append(File.generated(config, f"reference/{room}.md", content=f"# {room}\n\n::: segqc.{room}\n"))
    for path in COPIED:
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to files beside this folder lead to their copies in the site."""
    markdown = re.sub(r"\]\(\.\./", "](", markdown)
    for page, original in PAGES.items():
        markdown = re.sub(rf"\]\({re.escape(original)}(?=[)#])", f"]({page}", markdown)
    return markdown
