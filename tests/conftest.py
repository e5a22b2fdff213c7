"""One torch thread a worker, as two processes run on two cores; or as SPARSESSM_TEST_THREADS says."""

import os

import torch

torch.set_num_threads(int(os.environ.get("SPARSESSM_TEST_THREADS") or 1))
