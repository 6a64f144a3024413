"""The student release: each chapter as an nbgrader assignment, its solutions taken out by nbgrader itself.

nbgrader works in a temporary course. What comes back is the released notebooks and, for grading, their sources. No
notebook is paired with another file: a pair writes answers back into the student's version.

    python book/_ext/assignments.py [chapter …]    write _build/assignments/<chapter>.ipynb, _build/course/source/…
"""

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbgrader.apps import NbGraderAPI
from traitlets.config import Config

from chapters import ROOT, named
from notebooks import for_the_class, role

os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]  # nbgrader calls alembic by name
SECONDS_A_CELL = 60  # nbgrader's own limit; checks have tighter ones of their own


def course(folder):
    """nbgrader's interface to the course in a folder."""
    config = Config()
    config.CourseDirectory.root = str(folder)
    config.CourseDirectory.course_id = "communication-bottleneck"
    config.ExecutePreprocessor.timeout = SECONDS_A_CELL
    config.IncludeHeaderFooter.header = config.IncludeHeaderFooter.footer = ""
    return NbGraderAPI(config=config)


def release(chapters, folder):
    """Put each chapter with exercises into the course in `folder` and release it; returns the released paths.

    raises RuntimeError with nbgrader's own words where it refuses a chapter
    """
    interface, released = course(folder), []
    for chapter in chapters:
        notebook = for_the_class(jupytext.read(chapter))
        if not any(role(cell) for cell in notebook.cells):
            continue
        name = chapter.stem
        source = folder / "source" / name / f"{name}.ipynb"
        source.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, source)
        result = interface.generate_assignment(name)
        if not result["success"]:
            raise RuntimeError(f"nbgrader refuses {chapter}:\n{result.get('error') or ''}{result['log']}")
        released.append(folder / "release" / name / f"{name}.ipynb")
    return released


def main(names):
    target, build = ROOT / "_build" / "assignments", ROOT / "_build" / "course"
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(build, ignore_errors=True)
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        for notebook in release(named(names), Path(folder)):
            print(Path(shutil.copy(notebook, target)).relative_to(ROOT))
        shutil.copytree(Path(folder) / "source", build / "source")


if __name__ == "__main__":
    main(sys.argv[1:])
