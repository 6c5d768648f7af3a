"""The site of `make docs` has all pages of docs/ and all public names; tested without mkdocs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

import yaml

import peftkern

from .pages import ROOT, links, prose, read, tracked


def pages_of_the_root() -> dict[str, str]:
    """The constant of docs/hooks.py, which cannot be imported without mkdocs."""
    for node in ast.parse(read("docs/hooks.py")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PAGES":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("docs/hooks.py has no PAGES")


def leaves(nav: Any) -> Iterator[str]:
    for item in nav:
        for value in item.values():
            yield from leaves(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_site_once() -> None:
    nav = list(leaves(yaml.safe_load(read("mkdocs.yml"))["nav"]))
    own = [n.removeprefix("docs/") for n in tracked() if re.fullmatch(r"docs/.*\.md", n)]
    root = pages_of_the_root()
    assert all((ROOT / name).is_file() for name in root)
    assert sorted(nav) == sorted([*own, *root.values(), "examples.md"])


def test_the_site_asks_no_other_host() -> None:
    config = yaml.safe_load(read("mkdocs.yml"))
    assert config["theme"]["font"] is False and config["strict"] is True
    assert "http" not in read("mkdocs.yml") and not {"extra_css", "extra_javascript"} & set(config)


def test_links_out_of_docs_go_to_pages_that_the_site_has() -> None:
    """mkdocs has no other files of the root; docs/hooks.py rewrites these links."""
    root = pages_of_the_root()
    for name in (n for n in tracked() if re.fullmatch(r"docs/.*\.md", n)):
        for target in links(name):
            if target.startswith("../") and name.count("/") == 1:
                path = target.removeprefix("../").partition("#")[0]
                # docs/hooks.py makes a page of the scripts in examples/
                script = re.fullmatch(r"examples/\w+\.py", path) and (ROOT / path).is_file()
                assert script or path in root, (name, target)
    for name in root:  # what is not in docs/ would be a dead link there
        for target in links(name):
            path = target.partition("#")[0]
            assert path in root or re.fullmatch(r"(docs/.*\.md)?", path), (name, target)


def test_every_public_name_has_its_place_in_the_api() -> None:
    text = "".join(prose(n) for n in tracked() if n.startswith("docs/api/"))
    named = re.findall(r"^::: peftkern\.(\w+)$", text, re.M)
    assert sorted(named) == sorted(set(peftkern.__all__) - {"__version__"})
    assert "`peftkern.__version__`" in text
