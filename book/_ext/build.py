"""Build the book: execute what changed, stage the sources, let Jupyter Book make the pages. Any warning is an error.

Jupyter Book reads `_build/source`, which mirrors this repository's layout: the pages of book/ with their generated
tables filled in, and each chapter as an executed notebook. A file is rewritten only when it differs, so a second build
reads only those that changed.

    python book/_ext/build.py
"""

import fcntl
import re
import shutil
import subprocess
import sysconfig
import time

import nbformat

import pages
from chapters import ROOT, ChapterFailed, chapters, execute_all
from notebooks import for_the_book

BUILD = ROOT / "_build"
SOURCE = BUILD / "source"
BETWEEN = re.compile(r"(\]\((?:\.\./)+notebooks/\w+/\w+)\.md")  # links from a page to a chapter
AS_THEY_ARE = (".bib", ".png", ".svg")


def stage(executed):
    """Make `_build/source` out of the book's pages and the executed chapters {chapter: notebook's path}."""
    files = {}
    for path in (ROOT / "book").rglob("*"):
        if "_ext" in path.parts or "_static" in path.parts:
            continue
        if path.suffix == ".md":
            text = pages.fill(path.read_text(encoding="utf-8"), executed)
            files[path.relative_to(ROOT)] = BETWEEN.sub(r"\1.ipynb", text).encode()
        elif path.suffix in AS_THEY_ARE:
            files[path.relative_to(ROOT)] = path.read_bytes()
    for chapter, path in executed.items():
        notebook = for_the_book(nbformat.read(path, as_version=4), pages.module_of(chapter))
        files[chapter.relative_to(ROOT).with_suffix(".ipynb")] = nbformat.writes(notebook).encode()
    for stale in [path for path in SOURCE.rglob("*") if path.is_file() and path.relative_to(SOURCE) not in files]:
        stale.unlink()
    for name, content in files.items():
        target = SOURCE / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def site():
    """Run Jupyter Book; returns its exit code."""
    command = [f"{sysconfig.get_path('scripts')}/jupyter-book", "build", str(SOURCE), "--path-output", str(ROOT)]
    command += ["--config", str(ROOT / "_config.yml"), "--toc", str(ROOT / "book" / "_toc.yml")]
    command += ["--nitpick", "--warningiserror", "--keep-going", "--quiet"]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:  # Sphinx warns only about pages it reads: forget them, so that the next build warns again
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
    return code


def main():
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `make -j book test` builds once, then finds nothing to do
        start = time.perf_counter()
        try:
            executed = execute_all(chapters())
        except ChapterFailed as failed:
            raise SystemExit(str(failed)) from None
        stage(executed)
        if code := site():
            raise SystemExit(code)
    print(f"The book is built, in {time.perf_counter() - start:.0f} s. Open it:")
    print("  _build/html/index.html")
    print("  or, served:  python3 -m http.server -d _build/html   then   http://localhost:8000")


if __name__ == "__main__":
    main()
