"""Hypothesis profiles: a quick one, and ``--hypothesis-profile soak`` for the long run."""

import os
import signal
import threading

from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=60)
settings.register_profile("soak", deadline=None, max_examples=5_000)
settings.load_profile("default")

# Triton reads this when it is imported, by whichever test of a process comes first.
if os.environ.get("STREAMQ_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

# No test asks the real Hub: nothing listens there, and tests that need a Hub name a stand-in.
# huggingface_hub reads it when it is imported, and asks that address which agents there are.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"

# Shells ignore it for what they run in the background, and so would what tests start.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
