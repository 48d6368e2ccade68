"""Kernels run in Triton's interpreter here, which must be said before they are decorated: this folder is a process of its own."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import replace
from functools import cache

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

torch.set_num_threads(1)
# what overflows or is no number is so without a word on a GPU
np.seterr(all="ignore")
# the interpreter would spend two thirds of its time on looking for overflow in every sum of integers, on a table of types that
# it writes down for every value, and on entering the language anew at every inner call: the launch has done so for all but
# Triton's own functions, and what they see stays entered after the first of them
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
scalar = cache(interpreter._get_np_dtype)


def numpy_type(kind):
    kind = kind.element_ty if isinstance(kind, tl.block_type) else kind
    return np.dtype(np.uint64) if isinstance(kind, tl.pointer_type) else scalar(kind)


interpreter._get_np_dtype = numpy_type
enter_anew, entered = interpreter.InterpretedFunction.__call__, set()


def enter(self, *arguments, **named):
    module = self.fn.__module__
    if module.startswith("triton.") and module not in entered:
        entered.add(module)
        return enter_anew(self, *arguments, **named)
    return self.rewrite()(*arguments, **named)


interpreter.InterpretedFunction.__call__ = enter
