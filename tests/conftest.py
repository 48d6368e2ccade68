"""One thread a worker: the arrays are small, and threads that wait for each other cost more than they bring."""

import os

import torch

torch.set_num_threads(1)
# Triton's interpreter is for a whole process or not at all: `make test` runs that folder apart; the other one needs a device
interpreted = bool(os.environ.get("TRITON_INTERPRET"))
collect_ignore = [*([] if interpreted else ["triton"]), *([] if torch.cuda.is_available() and not interpreted else ["gpu"])]
