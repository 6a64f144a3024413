"""What a result depends on, as one digest: its own text, the toolkit modules it imports, and the libraries beneath.

The toolkit is followed by reading import statements, those inside functions too; nothing is executed.
"""

import ast
import hashlib
from importlib import metadata

LIBRARIES = ("ipywidgets", "matplotlib", "networkx", "numba", "numpy", "scipy")
DATA = (".css", ".html", ".js", ".json", ".mplstyle")  # of the toolkit: read at run time, so part of every digest


def digest(content, code, root):
    """SHA-256 in hexadecimal, 16 digits, over `content` (bytes), all that `code` imports, and versions of libraries."""
    data = {file for file in (root / "toolkit").rglob("*.*") if file.suffix in DATA}
    total = hashlib.sha256(content)
    for file in sorted(imported(code, root) | data):
        total.update(f"\0{file.relative_to(root)}\0".encode() + file.read_bytes())
    for name in LIBRARIES:
        total.update(f"\0{name} {metadata.version(name)}".encode())
    return total.hexdigest()[:16]


def imported(code, root):
    """Files of the toolkit that `code` imports, directly or through other files of the toolkit.

    IPython's own lines (%, !) are left out; modules that do not exist are no concern of ours.
    """
    python = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines())
    found, waiting = set(), _named(python, "", root)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            package = ".".join(file.parent.relative_to(root).parts)
            waiting |= _named(file.read_text(encoding="utf-8"), package, root)
    return found


def _named(code, package, root):
    """Files that the import statements of one source name; `package` is where the source lies, dotted."""
    files = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            names = []
        for name in names:
            files |= _files(name, root)
    return files


def _absolute(node, package):
    """`from ..runtime import x` inside toolkit.show is `from toolkit.runtime import x`."""
    if not node.level:
        return node.module
    above = package.split(".")[: len(package.split(".")) + 1 - node.level]
    return ".".join(above + ([node.module] if node.module else []))


def _files(name, root):
    """The module of a dotted name and the packages on the way to it, as far as they are files of the toolkit."""
    parts = name.split(".")
    if parts[0] != "toolkit":
        return set()
    paths = [root.joinpath(*parts[: depth + 1]) for depth in range(len(parts))]
    candidates = [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")]
    return {file for file in candidates if file.exists()}
