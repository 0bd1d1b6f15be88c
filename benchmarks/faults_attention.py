"""Scenarios of faults.py: attention and embeddings."""

from __future__ import annotations

from faults_runs import Scenario

SCENARIOS: tuple[Scenario, ...] = ()
