"""Sets one thread for NumPy's products before NumPy is loaded, and no limit for the time of an example.

The tests' matrices are small, and on a busy machine the threads of BLAS mostly wait for each other.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
