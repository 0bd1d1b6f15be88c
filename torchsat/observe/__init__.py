"""One observation: hooks go on the model, a training step runs, and what they saw becomes `Parts`.

`observation.py` has the value itself. `SOURCES` there lists where activations come from; each source is one file with one function `attach`, which
puts its hooks on what the walk over the modules has found. What all sources share is in hooks (the guard), passes (which pass counts), lineage (which
layer feeds which site) and meter (from z, a and gradients to rows).
"""
