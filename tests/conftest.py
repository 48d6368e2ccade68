"""One thread a worker: the arrays are small, and threads that wait for each other cost more than they bring."""

import os

# the tests compile thousands of small computations, and each would set up XLA's newer emitters anew: three times as long.
# `XLA_FLAGS= pytest` runs them with XLA's own settings.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import torch

torch.set_num_threads(1)
# Triton's interpreter is for a whole process or not at all: `make test` runs that folder apart; the other one needs a device
interpreted = bool(os.environ.get("TRITON_INTERPRET"))
collect_ignore = [*([] if interpreted else ["triton"]), *([] if torch.cuda.is_available() and not interpreted else ["gpu"])]
