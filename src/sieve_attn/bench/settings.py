"""What a benchmark run was asked for, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sieve_attn import checks
from sieve_attn.checks import error, positive_int

GROUPS = ("prefill", "backward", "decode", "gate", "topk", "ternary", "index")
FRAMEWORKS = ("torch", "jax")  # JAX has a group of its own, `jax`
PEERS = ("sdpa", "flex")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
ON_CUDA = ("prefill", "backward", "decode", "gate", "topk")  # groups that have cases there

QUICK_N, QUICK_KEYS, QUICK_REPEATS = 1024, 8192, 3


@dataclass(frozen=True)
class Settings:
    """One run. ``None`` leaves a choice to the group: its own lengths, dtypes and head dimensions.

    ``n``: queries and keys of ``prefill``, ``backward``, ``topk`` and of the shares of ``gate``, whose other rows stop at that
    length. ``keys``: the cache of ``decode``. ``repeats``: at least so many samples a median,
    up to five times as many where they do not agree about a target. ``long`` adds the rows that take
    minutes and gigabytes; ``quick`` is small sizes, one thread and few repeats, where these are not given. ``device``: where
    everything runs; ``cuda`` has cases and targets of its own.
    """

    groups: tuple[str, ...] = GROUPS
    n: int | None = None
    keys: int | None = None
    dtypes: tuple[str, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    threads: tuple[int, ...] | None = None
    repeats: int | None = None
    peers: tuple[str, ...] = PEERS
    backend: str = "auto"
    seed: int = 0
    quick: bool = False
    long: bool = False
    framework: str = "torch"
    device: str = "cpu"

    def __post_init__(self):
        one_of("framework", (self.framework,), FRAMEWORKS, "leave it out for PyTorch")
        if self.framework == "jax":
            if self.groups != GROUPS:
                raise error("group", "must be left out with framework jax, which has one of its own", ", ".join(self.groups),
                            "run `sieve bench --framework jax`")  # fmt: skip
            object.__setattr__(self, "groups", ("jax",))
        one_of(
            "group",
            self.groups,
            (*GROUPS, "jax") if self.framework == "jax" else GROUPS,
            "for the published benchmark run `sieve bench aether`",
        )
        one_of("device", (self.device,), DEVICES, "leave it out for the CPU")
        if self.device == "cuda":
            self._check_cuda()
        one_of("peers", self.peers, PEERS, "separate them by commas")
        if self.dtypes is not None:
            one_of("dtype", self.dtypes, DTYPES, "kernels are measured in these")
        for name, value, least in (("n", self.n, 64), ("keys", self.keys, 64), ("repeats", self.repeats, 1)):
            if value is not None:
                positive_int(name, value, "leave it out for the default", least=least)
        for head_dim in self.head_dims or ():
            positive_int("head_dim", head_dim, "try 64")
        for threads in self.threads or ():
            checks.threads(threads, "leave it out for 1 and 2")
        quick = {"n": QUICK_N, "keys": QUICK_KEYS, "repeats": QUICK_REPEATS, "threads": (1,)} if self.quick else {}
        full = {"keys": 131_072, "repeats": 7, "threads": (1, 2) if (os.cpu_count() or 1) > 1 else (1,)}
        for name, value in (full | quick).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _check_cuda(self) -> None:
        """Nothing is measured where there is no GPU, and nothing is claimed."""
        import torch

        if not torch.cuda.is_available():
            raise error("device", "must be a device of this machine, which has no CUDA GPU", "'cuda'", "leave it out for the CPU")
        if self.groups == GROUPS:
            object.__setattr__(self, "groups", ON_CUDA)
        one_of("group", self.groups, ON_CUDA, "the others run on the CPU")
        if self.threads not in (None, (1,)):
            raise error("threads", "must be left out on a GPU", ", ".join(map(str, self.threads)), "one host thread launches")
        object.__setattr__(self, "threads", (1,))

    def allows(self, length: int) -> bool:
        """Whether a row of a fixed ``length`` belongs to this run."""
        return self.n is None or length <= self.n


def one_of(argument: str, given: tuple[str, ...], allowed: tuple[str, ...], remedy: str) -> None:
    """Raise ValueError unless every name in ``given`` is ``allowed``."""
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise error(argument, f"must be of {', '.join(allowed)}", ", ".join(map(repr, unknown)), remedy)
