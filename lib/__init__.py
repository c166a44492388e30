"""Constraints, recipes, mappings, faults and costs of compressed neural networks.

One module per room; see the folder map in README.md. ``import lib`` needs no path set-up: the package is
installed in editable mode by requirements.txt.
"""

import os

# One thread unless the user says otherwise: with more, a CPU training run is not bit-identical to its repeat.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
