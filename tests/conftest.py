"""Settings shared by all tests."""

import os

from hypothesis import HealthCheck, settings

from tinyvit import shards

# Derandomised: the same tree gives the same verdict on every machine. Deadlines say nothing on shared cores.
settings.register_profile(
    "tinyvit", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tinyvit")

# TINYVIT_TEST_THREADS=4 runs the tests as a machine with four cores would.
if "TINYVIT_TEST_THREADS" in os.environ:
    shards.available_cores = lambda: int(os.environ["TINYVIT_TEST_THREADS"])
