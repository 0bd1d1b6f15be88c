"""Two settings of torch.compile that hold for the whole process, shared by all monitors that need them.

- The stance: whether compiled functions run compiled or eager. An observed step of a compiled model may have to run eager, since hooks that were
  added after the compilation never fire in a graph.
- The guards on hooks: by default torch ignores that the hooks of a module have changed. A graph that was compiled for one model then also runs for
  other models of the same class, and for a model that was given hooks later.

Each monitor asks for a setting under a key of its own (its `Watcher`, see process.py) and gives it back. The setting that the user had is restored
when the last monitor has given it back.
"""

from __future__ import annotations

from typing import Any

import torch

from torchsat.internals import skips_hook_guards, stance

_forcing: dict[object, None] = {}
"""The keys of the monitors that need eager execution now."""
_set_stance: tuple[Any, object] | None = None
"""The object whose `__exit__` restores the stance from before ours, and our stance. None: no stance of ours is set."""
_guarding: dict[object, None] = {}
"""The keys of the monitors that need guards on hooks."""
_skipped_before = True
"""The setting of torch before the first monitor asked for guards on hooks."""


def force_eager(key: object) -> None:
    """Run compiled code eager until every monitor that asked for it has released it."""
    global _set_stance
    if not _forcing:
        restore_stance()
    _forcing[key] = None
    if _set_stance is None:
        _set_stance = torch.compiler.set_stance("force_eager"), stance()


def forces_eager() -> bool:
    """Whether some monitor asked for eager execution."""
    return bool(_forcing)


def release(key: object) -> None:
    """This monitor no longer needs eager execution."""
    _forcing.pop(key, None)
    restore_stance()


def linger() -> None:
    """Let the compiled call that is under way end as one that ran eager, while other calls may use the graphs that exist already.

    A function compiled with fullgraph=True raises at its end if it found no graph and the stance is the default by then. So a monitor that needs no
    eager execution any more, in the middle of such a call, sets this stance. It lasts until a monitor calls `release` or an optimizer has stepped.
    """
    global _set_stance
    if _set_stance is None and not _forcing:
        _set_stance = torch.compiler.set_stance("eager_on_recompile"), stance()


def restore_stance() -> None:
    """Restore the stance from before ours if no monitor needs ours any more.

    Where the user has set another stance since then, ours is not the innermost one. It is restored by a later call, when the user's is over.
    """
    global _set_stance
    if _set_stance is not None and not _forcing and stance() is _set_stance[1]:
        _set_stance[0].__exit__(None, None, None)
        _set_stance = None


def heed_hooks(key: object) -> None:
    """Make torch.compile check the hooks of modules before it runs a graph, until every monitor that asked for it has called `ignore_hooks`."""
    global _skipped_before
    if not _guarding:
        _skipped_before = skips_hook_guards()
        skips_hook_guards(False)
    _guarding[key] = None


def ignore_hooks(key: object) -> None:
    """This monitor has no hooks in compiled code any more."""
    if key in _guarding:
        del _guarding[key]
        if not _guarding:
            skips_hook_guards(_skipped_before)
