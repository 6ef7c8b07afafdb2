"""How long the fuzzers look: a few cases, the same in every test run; with `make fuzz` as many new ones as it is told."""

import os

from hypothesis import HealthCheck, settings

CASES = int(os.environ.get("FASTUNLEARN_FUZZ", "0"))
settings.register_profile("ci", max_examples=40, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=max(CASES, 1), deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("long" if CASES else "ci")
