"""What all tests of a process share.

One thread for NumPy's products, set before NumPy is loaded: the tests' matrices are small, and on a busy
machine the threads of BLAS mostly wait for each other. No limit for the time of an example.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
