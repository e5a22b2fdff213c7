"""One torch thread a worker, since the suite runs in two processes on two cores, or OMP_NUM_THREADS."""

import os

import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
