"""torchsat in loops that belong to other libraries, each in a module of its name that imports it."""

import logging
from typing import Any

from torchsat.monitor import Monitor

log = logging.getLogger("torchsat")


def take_up(monitor: Monitor, state: dict[str, Any]) -> None:
    """What a checkpoint holds of a monitor; one that another version wrote does not stop the training that it resumes."""
    try:
        monitor.load_state_dict(state)
    except ValueError as error:
        log.warning("torchsat: the checkpoint's state of the monitor is not taken up, alerts begin anew: %s", error)
