"""torchsat in training loops that belong to other libraries.

Each library has a module of its name here, and only that module imports the library, so none of them is needed otherwise.
"""

import logging
from typing import Any

from torchsat.monitor import Monitor

log = logging.getLogger("torchsat")


def take_up(monitor: Monitor, state: dict[str, Any]) -> None:
    """Load the state of a monitor from a checkpoint.

    A state that another version of torchsat wrote, and that cannot be read, is reported in the log. It does not stop the training that is resumed.
    """
    try:
        monitor.load_state_dict(state)
    except ValueError as error:
        log.warning("torchsat: the checkpoint's state of the monitor is not taken up, alerts begin anew: %s", error)
