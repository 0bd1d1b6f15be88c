"""Facts about a site and a layer, for tests that make rows and records by hand."""

from typing import Any

from torchsat.record import LayerFacts, SiteFacts


def site_facts(name: str = "act", **given: Any) -> SiteFacts:
    """A tanh site of four units, with these facts in place of those."""
    values = {"activation": "tanh", "kind": "module", "tails": "both", "output": False, "gate": False, "after": (), "units": 4}
    normal = {"normal_low": 0.01, "normal_high": 0.01, "normal_derivative": 0.6}
    return SiteFacts(site=name, **{**values, **normal, **given})


def layer_facts(name: str = "layer", **given: Any) -> LayerFacts:
    """A layer that feeds the site of `site_facts`, with these facts in place of its own."""
    return LayerFacts(**{"name": name, "feeds": ("act",), "fan_in": 3, "data": False, **given})
