"""One observation: hooks are put on the model, a training step runs, and what the hooks measured becomes `Parts`.

`observation.py` has the class `Observation`. `SOURCES` there lists where activations come from; each source is one file with one function `attach`,
which puts its hooks on the modules that the walk has found (structure.py). The sources share hooks.py (the guard that every hook runs through),
passes.py (which forward passes count), lineage.py (which layer feeds which site) and meter.py (from z, a and gradients to rows).
"""
