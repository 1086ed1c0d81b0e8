"""The worker: streams a checkpoint through passes, one block in memory."""

import os

# OpenMP's threads spin for work that a stream of small operations never brings, on cores that the kernels and the uploads need.
# It must be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
