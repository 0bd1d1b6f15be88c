"""The entry point of TensorBoard. It imports nothing that can fail, since an error while it is imported stops all of TensorBoard."""

from __future__ import annotations

from typing import Any

from tensorboard.plugins import base_plugin

from torchsat.tensorboard import PLUGIN

OBSERVATIONS = 1000
"""How many observations TensorBoard keeps of each of our tags; its own default is 10, or 100."""


class Loader(base_plugin.TBLoader):  # type: ignore[misc]
    """Makes the Saturation tab; where that fails, TensorBoard goes on without it."""

    def fix_flags(self, flags: Any) -> None:
        """Keep more observations, unless the user has said how many: runs before the data server starts."""
        if getattr(flags, "samples_per_plugin", None) is not None:
            flags.samples_per_plugin.setdefault(PLUGIN, OBSERVATIONS)

    def load(self, context: base_plugin.TBContext) -> base_plugin.TBPlugin:
        from torchsat.tensorboard.plugin import SaturationPlugin

        return SaturationPlugin(context)
