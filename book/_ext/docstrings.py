"""Sphinx extension: the reference shows docstrings as they are written, "show source" leads to the chapter's text.

Our docstrings are plain text with aligned columns, not reStructuredText. A paragraph whose columns line up, or that is
indented, stays as it stands, in a literal block; any other paragraph is prose.
"""

import re
from itertools import groupby


def setup(app):
    app.connect("autodoc-process-docstring", as_written)
    app.connect("autodoc-skip-member", skip)
    app.connect("html-page-context", source_is_markdown, priority=100)  # before the theme makes its links
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def as_written(app, what, name, obj, options, lines):
    """Rewrite the docstring's lines in place."""
    written = []
    for empty, paragraph in groupby(lines, key=lambda line: not line.strip()):
        paragraph = list(paragraph)
        if empty:
            continue
        if any(re.match(r"\s|.*\S {2,}\S", line) for line in paragraph):
            written += [".. code-block:: text", "", *("   " + line for line in paragraph), ""]
        else:
            written += [escaped(" ".join(line.strip() for line in paragraph)), ""]
    lines[:] = written


def escaped(text):
    """Plain text as reStructuredText; `names` become literals, an empty escape between them and a letter."""
    pieces = []
    for piece in re.split(r"(\w?`[^`]+`\w?)", text):
        if literal := re.fullmatch(r"(\w?)`([^`]+)`(\w?)", piece):
            before, name, after = literal.groups()
            pieces.append((before and f"{before}\\ ") + f"``{name}``" + (after and f"\\ {after}"))
        else:
            pieces.append(re.sub(r"([*|\\`]|_(?=\W|$))", r"\\\1", piece))
    return "".join(pieces)


def skip(app, what, name, obj, skipped, options):
    """Fields of named tuples have docstrings that say nothing; None leaves the decision to others."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def source_is_markdown(app, page, template, context, doctree):
    """Chapters are staged as executed notebooks, but their source is the Markdown file of the same name."""
    if context.get("page_source_suffix") == ".ipynb":
        context["page_source_suffix"] = ".md"
