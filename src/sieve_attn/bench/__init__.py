"""``sieve bench``: correctness first, then time against the fastest dense kernels of the same run.

``settings`` says what was asked for, ``cases`` turns that into data, ``driver`` measures one case after the other: builders in
``attending``, ``gating`` and ``top_k`` make its arrays and calls, ``truth`` checks, ``timing`` and ``peers`` measure. ``table``
and ``results`` show the rows. ``aether`` is AETHER's published benchmark.
"""
