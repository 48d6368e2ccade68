"""AETHER's published benchmark: ``cases`` (flags and arrays), ``run``, ``verify`` and ``show``."""
