"""The steps that Binder takes, in an empty virtual environment and on a fresh copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "_build", "__pycache__", "*.ipynb", "*.egg-info", ".*_cache")


@pytest.fixture(scope="module")
def binder(root, tmp_path_factory):
    """The repository after Binder's steps."""
    home = tmp_path_factory.mktemp("binder") / "repository"
    shutil.copytree(root, home, ignore=LEFT_OUT)
    subprocess.run([sys.executable, "-m", "venv", home / ".venv"], check=True)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["PATH"] = f"{home / '.venv' / 'bin'}{os.pathsep}{env['PATH']}"
    install = "python -m pip install --quiet --disable-pip-version-check -r .binder/requirements.txt"
    subprocess.run(install.split(), cwd=home, env=env, check=True)
    subprocess.run([".binder/postBuild"], cwd=home, env=env, check=True)
    return home


def test_binder_pins_everything_that_the_toolkit_needs(root):
    needed = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    requirements = (root / ".binder" / "requirements.txt").read_text(encoding="utf-8")
    pinned = re.findall(r"^([\w-]+)==", requirements, re.MULTILINE)
    assert {re.match(r"[\w-]+", line)[0] for line in needed} <= set(pinned)


def test_binder_has_every_chapter_as_a_notebook(binder, root):
    chapters = {path.relative_to(root).with_suffix(".ipynb") for path in (root / "notebooks").glob("*/*.md")}
    assert {path.relative_to(binder) for path in (binder / "notebooks").glob("*/*.ipynb")} == chapters


def test_binder_has_compiled_the_kernels_beforehand(binder):
    assert list((binder / "toolkit" / "kernels" / "__pycache__").glob("*.nbc"))
