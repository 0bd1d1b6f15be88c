"""Why a mixture of experts uses few of its experts; standard library only.

A router that learns without anything that balances the load feeds itself: an expert that gets more tokens learns faster, becomes better, and gets
more still (Shazeer et al. 2017). What is measured says how far this has gone, and whether the router is sure of it, but not what began it.
"""

from __future__ import annotations

from torchsat.causes import advice
from torchsat.causes.growth import jumped
from torchsat.causes.scene import HOT, Scene, Term
from torchsat.percent import percent
from torchsat.record import Alert

_SURE = 0.5
"""At a lower entropy the router is sure of what it chooses."""


def of_experts(alert: Alert, scene: Scene) -> list[Term]:
    """What has made a router choose few experts: its own feedback, and a step that was too large, if there was one."""
    now, first = (next((each for each in snapshot.experts if each.site == alert.site), None) for snapshot in (scene.now, scene.first))
    if now is None:
        return []
    evidence = f"{now.dead} of {now.experts} experts get less than a twentieth of an even load, the busiest {now.busiest:.2g} times an even one"
    if first is not None and scene.started:
        evidence += f"; at the first observation it was {first.busiest:.2g}"
    is_sure = now.entropy is not None and now.entropy < _SURE
    if now.entropy is not None:
        evidence += f"; the entropy of the router is {percent(now.entropy)} of ln {now.experts}"
    names = [weight.name for weight in scene.now.weights]
    jump = scene.jump(names)
    hot = jumped(scene, names, 0.5) if jump is not None and jump.ratio >= HOT and scene.started else []
    return [Term("router_collapse", 1.0, evidence, advice.balance(is_sure)), *hot]
