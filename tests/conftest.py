"""One torch thread a worker, as the suite runs in two processes on two cores; more if OMP_NUM_THREADS says so."""

import os

import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
