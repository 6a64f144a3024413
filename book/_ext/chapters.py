"""Execute chapters in parallel, each only when it, or the toolkit under it, has changed.

Jupyter Book's cache compares a chapter's cells, so it would keep the figures of an algorithm that has been changed
since. Ours looks at the toolkit too: see freshness.py.

    python book/_ext/chapters.py [chapter …]      execute what changed, print seconds a chapter
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import freshness

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 20.0  # seconds: what a chapter may take on two cores; more is reported


class ChapterFailed(Exception):
    """A cell raised; the message has the chapter, the cell's number and text, and the traceback."""


def chapters(root=ROOT):
    """Paths of all chapters, sorted."""
    return sorted((root / "notebooks").glob("*/*.md"))


def named(names, root=ROOT):
    """The chapters of these names, or all; raises SystemExit naming an unknown one."""
    known = {path.stem: path for path in chapters(root)}
    for name in names:
        if name not in known:
            raise SystemExit(f"no chapter {name!r} in notebooks/; there are: {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def key(chapter, root=ROOT):
    """Digest of all that the chapter's outputs depend on: its text, what it imports, and the claims of its name."""
    notebook = jupytext.read(chapter)
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    claims = f"toolkit.claims.{chapter.parent.name}.{chapter.stem}"
    return freshness.digest(chapter.read_bytes(), f"{code}\nimport {claims}", root)


def execute(chapter, root=ROOT):
    """Run one chapter in a fresh kernel and return the notebook, its seconds in `metadata.seconds`.

    A kernel that dies or stops answering gets a second try; a cell that raises does not.
    """
    try:
        return _execute(chapter, root)
    except (RuntimeError, TimeoutError) as error:
        print(f"  {chapter.stem}: {type(error).__name__}, once more", flush=True)
    try:
        return _execute(chapter, root)
    except (RuntimeError, TimeoutError) as error:
        raise ChapterFailed(f"{chapter.relative_to(root)}: the kernel died or did not answer, twice\n{error}") from None


def _execute(chapter, root):
    notebook = jupytext.read(chapter)
    notebook.metadata.pop("jupytext", None)
    client = NotebookClient(
        notebook,
        timeout=200,  # seconds a cell
        kernel_name="python3",
        resources={"metadata": {"path": str(chapter.parent)}},
        extra_arguments=["--IPKernelApp.log_level=40"],  # errors only; it warns about plain TCP at each start
    )
    start = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as error:
        raise ChapterFailed(_where(chapter, notebook, str(error), root)) from None
    notebook.metadata["seconds"] = round(time.perf_counter() - start, 2)
    return notebook


def _where(chapter, notebook, trace, root):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    number = next(
        (i for i, cell in enumerate(code, 1) if any(o.output_type == "error" for o in cell.get("outputs", ()))), 0
    )
    return f"{chapter.relative_to(root)}: code cell {number} of {len(code)} failed\n{trace}"


def cached(chapter, root=ROOT):
    """Where the executed notebook of the chapter, as everything is now, lies or will lie."""
    return root / "_build" / "chapters" / f"{chapter.parent.name}-{chapter.stem}-{key(chapter, root)}.ipynb"


def _execute_into_cache(chapter, target, root):
    """In a worker process: returns (seconds, None) or (None, what failed)."""
    try:
        notebook = execute(chapter, root)
    except ChapterFailed as failed:
        return None, str(failed)
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{chapter.parent.name}-{chapter.stem}-*.ipynb"):
        old.unlink()
    fresh = target.with_suffix(".part")
    nbformat.write(notebook, fresh)
    fresh.rename(target)  # a file under its final name is whole
    return notebook.metadata["seconds"], None


def execute_all(wanted, root=ROOT):
    """Execute those of the chapters that changed; returns {chapter: executed notebook's path}.

    raises ChapterFailed, after all have run, with the report of each that failed
    """
    paths = {chapter: cached(chapter, root) for chapter in wanted}
    stale = [chapter for chapter in wanted if not paths[chapter].exists()]
    print(f"chapters: {len(stale)} of {len(wanted)} to execute", flush=True)
    failures = []
    with ProcessPoolExecutor(max_workers=max(1, min(len(stale), os.cpu_count() or 1))) as pool:
        for chapter, (seconds, failed) in zip(
            stale, pool.map(_execute_into_cache, stale, (paths[c] for c in stale), repeat(root)), strict=True
        ):
            if failed:
                failures.append(failed)
            else:
                slow = f"   over the limit of {LIMIT:g} s" if seconds > LIMIT else ""
                print(f"  {seconds:6.1f} s  {chapter.parent.name}/{chapter.stem}{slow}", flush=True)
    if failures:
        raise ChapterFailed("\n\n".join(failures))
    return paths


if __name__ == "__main__":
    try:
        execute_all(named(sys.argv[1:]))
    except ChapterFailed as failed:
        raise SystemExit(str(failed)) from None
