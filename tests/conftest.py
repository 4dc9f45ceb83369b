"""Settings shared by all tests."""

from hypothesis import HealthCheck, settings

# Derandomised: the same tree gives the same verdict on every machine. Deadlines say nothing on shared cores.
settings.register_profile(
    "tinyvit", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tinyvit")
