"""What `mkdocs build` needs besides mkdocs.yml: pages that stand at the root of the repository, and
headings' anchors as GitHub makes them, so that one link works in both places."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# {file at the root: its page}
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
# the page of the scripts in examples/, each under a heading of its file's name
EXAMPLES = "examples.md"
_SCRIPT = re.compile(r"\]\((?:\.\./)?examples/(\w+)\.py\)")
# what Sphinx reads and Markdown does not: :class:`~peftkern.PeftModel`
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc|obj):<code>([^<]*)</code>")


def slugify(heading: str, separator: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    config["mdx_configs"].setdefault("toc", {})["slugify"] = slugify
    return config


def examples() -> str:
    """The text of the page of examples."""
    parts = ["# Examples\n\nScripts to copy from, in `examples/`. Each runs on a CPU in seconds.\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts.append(f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n")
    return "\n".join(parts)


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for root, there in PAGES.items():
            text = text.replace(f"]({root}", f"]({there}")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    files.append(File.generated(config, EXAMPLES, content=examples()))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    for root, page in PAGES.items():
        markdown = markdown.replace(f"](../{root}", f"]({page}")
    return _SCRIPT.sub(lambda found: f"]({EXAMPLES}#{slugify(found[1] + '.py', '-')})", markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    def plain(found: re.Match[str]) -> str:
        name = found[1]
        return f"<code>{name.rpartition('.')[2] if name[:1] in '~.' else name}</code>"

    return _ROLE.sub(plain, html)
