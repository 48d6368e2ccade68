"""One thread a worker: the arrays are small, and threads that wait for each other cost more than they bring."""

import os

import torch

torch.set_num_threads(1)
# Triton's interpreter is for a whole process or not at all: `make test` runs that folder apart
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") else ["triton"]
