"""What chapters show with: pictures that are SVG text plus the same in words, tables, and the explorer.

    timeline(run, …)       who computed, sent, received and waited, and when     critical_path(run)
    topology.picture(…)    the machine, its links thick by load                  memory.picture(run)
    roofline(device, …)    what bounds each kernel                               blocks.ownership(…)
    explore(render, …)     a picture over a grid of values, without a kernel     claims_table(system)
    text                   the same for a terminal                               perfetto, ink

Nothing is imported before it is used: drawing a timeline needs neither matplotlib nor ipywidgets.
"""

import sys
from importlib import import_module
from types import ModuleType

_FUNCTIONS = {
    "explore": "explore",
    "ExplorerTooLarge": "explore",
    "timeline": "timeline",
    "critical_path": "critical_path",
    "roofline": "roofline",
    "claims_table": "claims",
    "Picture": "picture",
    "INK": "ink",
}
_MODULES = ("blocks", "ink", "memory", "perfetto", "text", "topology")
__all__ = sorted({*_FUNCTIONS, *_MODULES})


class _Show(ModuleType):
    """Where a function and its module share a name, `show.<name>` is the function, whichever was imported first."""

    def __setattr__(self, name, value):
        if isinstance(value, ModuleType) and _FUNCTIONS.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name):
    if name in _FUNCTIONS:
        return getattr(import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__


sys.modules[__name__].__class__ = _Show
