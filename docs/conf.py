"""Sphinx: `make docs`. Pages are Markdown (MyST); the API reference comes from docstrings."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert

from cpo_fast.version import __version__

project = "cpo_fast"
author = "the cpo_fast authors"
copyright = "the cpo_fast authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

default_role = "code"  # docstrings put names between single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
nitpicky = False

html_theme = "alabaster"
html_theme_options = {"description": "counterfactual preference optimisation, fast and packed",
                      "fixed_sidebar": True, "page_width": "1100px"}  # fmt: skip
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}
html_show_sourcelink = False


def _inline(writer: Any, node: Any) -> None:
    writer.body.append(convert(node.astext()))
    raise _skip()


def _block(writer: Any, node: Any) -> None:
    writer.body.append(convert(node.astext(), display="block"))
    raise _skip()


def _skip() -> Exception:
    from docutils.nodes import SkipNode

    return SkipNode()


def setup(app: Any) -> None:
    """Equations as MathML, which browsers draw by themselves: a page needs no network."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(_inline, None), block_renderers=(_block, None)
    )


html_math_renderer = "mathml"
