"""The entry point that TensorBoard imports. It imports nothing that can fail itself, since an error at this moment stops all of TensorBoard."""

from __future__ import annotations

from typing import Any

from tensorboard.plugins import base_plugin

from torchsat.tensorboard import PLUGIN

OBSERVATIONS = 1000
"""How many observations TensorBoard keeps of each of our tags. Its own default is 10 or 100."""


class Loader(base_plugin.TBLoader):  # type: ignore[misc]
    """Makes the Saturation tab. If that fails, TensorBoard runs on without the tab."""

    def fix_flags(self, flags: Any) -> None:
        """Make TensorBoard keep more observations of our data, unless the user has said how many. Called before its data server starts."""
        if getattr(flags, "samples_per_plugin", None) is not None:
            flags.samples_per_plugin.setdefault(PLUGIN, OBSERVATIONS)

    def load(self, context: base_plugin.TBContext) -> base_plugin.TBPlugin:
        from torchsat.tensorboard.plugin import SaturationPlugin

        return SaturationPlugin(context)
