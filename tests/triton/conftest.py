"""Kernels run in Triton's interpreter here, which must be said before they are decorated: this folder is a process of its own."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import replace

import numpy as np
import torch
from triton.runtime import interpreter

torch.set_num_threads(1)
# what overflows or is no number is so without a word on a GPU
np.seterr(all="ignore")
# the interpreter would spend half of its time on looking for overflow in every sum of integers, and on entering the language
# anew at every inner call, although the launch has done so for all but Triton's own functions
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
enter_anew = interpreter.InterpretedFunction.__call__


def enter(self, *arguments, **named):
    if self.fn.__module__.startswith("triton."):
        return enter_anew(self, *arguments, **named)
    return self.rewrite()(*arguments, **named)


interpreter.InterpretedFunction.__call__ = enter
