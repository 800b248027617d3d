"""Experiments: each trains a real model with one codec after another and says what it cost and reached."""

import os

# Before numpy is first imported: the devices that a CPU emulates share its cores, and LAPACK's own threads
# then fight each other; 20 eigh(100) on each of 8 devices took 1 to 2.3 s with them and 0.07 s without.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
