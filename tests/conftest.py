"""What all tests share.

One thread for NumPy's products, set before NumPy is loaded: the tests' matrices are small, and on a busy
machine the threads of BLAS mostly wait for each other. No limit for the time of an example. One directory for
the builds of the simulated kernels, for all processes among which the tests are distributed. Ctrl-C reaches
the programs that tests start, also where a shell in the background has it ignored.
"""

import os
import shutil
import signal
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


def pytest_configure(config: pytest.Config) -> None:
    """The first process has the directory made; those that it starts inherit its environment."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not os.environ.get("FFMINI_SIM_DIR"):
        directory = tempfile.mkdtemp(prefix="ffmini-sim-")
        os.environ["FFMINI_SIM_DIR"] = directory
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
