"""Measurements side by side in one process: contenders take turns, and a ratio is the median of neighbours in time.

- ``common``: ``compare`` (the alternating timer), ``Measurement``, ``BenchReport`` (text, JSON, Markdown, picture).
- ``attention``, ``model``, ``step``, ``data``, ``checkpoint``: ``bench(...)`` of each gives a report; ``dattrain bench`` prints it.

Comparisons that made a page of ``docs/benchmarks`` once, and everything that is asked of a GPU, are in ``benchmarks/`` of the
repository. Speed of a run is in ``observe``.
"""
