"""What a test has loaded from outside is gone again for the next one."""

from __future__ import annotations

import sys
from contextlib import contextmanager

from dualhead.components import plugins
from dualhead.recipe import REGISTRIES


@contextmanager
def nothing_from_outside():
    """Inside, nothing from outside has been run yet; afterwards registries and imports are as before."""
    classes = {kind: dict(registry._classes) for kind, registry in REGISTRIES.items()}
    loaded, path, modules = dict(plugins._loaded), list(sys.path), set(sys.modules)
    installed, broken = plugins._installed_loaded, dict(plugins._broken)
    plugins._loaded.clear()
    plugins._broken.clear()
    plugins._stand_ins.clear()
    plugins._installed_loaded = False
    for kind, registry in REGISTRIES.items():
        registry.names()
        classes[kind] |= {name: cls for name, cls in registry._classes.items() if name not in classes[kind]}
    try:
        yield
    finally:
        for kind, registry in REGISTRIES.items():
            registry._classes.clear()
            registry._classes.update(classes[kind])
        plugins._loaded.clear()
        plugins._loaded.update(loaded)
        plugins._broken.clear()
        plugins._broken.update(broken)
        plugins._installed_loaded = installed
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if not name.startswith(("dualhead.", "torch")) and name.startswith(("dualhead_plugin", "outside")):
                del sys.modules[name]
