"""Scenarios of faults.py: networks that were trained before."""

from __future__ import annotations

from faults_runs import Scenario

SCENARIOS: tuple[Scenario, ...] = ()
