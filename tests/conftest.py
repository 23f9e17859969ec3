"""Hypothesis profiles: a quick one, and ``--hypothesis-profile soak`` for the long run."""

from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=60)
settings.register_profile("soak", deadline=None, max_examples=5_000)
settings.load_profile("default")
