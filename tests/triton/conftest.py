"""Kernels run in Triton's interpreter here, which must be said before they are decorated."""

import os

os.environ["TRITON_INTERPRET"] = "1"
