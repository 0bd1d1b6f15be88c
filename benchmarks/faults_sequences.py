"""Scenarios of faults.py: sequences."""

from __future__ import annotations

from faults_runs import Scenario

SCENARIOS: tuple[Scenario, ...] = ()
