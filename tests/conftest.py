"""Sets one thread for NumPy's products before NumPy is loaded.

The tests' matrices are small, and on a busy machine the threads of BLAS mostly wait for each other.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
