"""Numbers of a running training: ``metrics`` (metrics.jsonl and TensorBoard), ``throughput``, ``profile`` with ``roofline``.

What is measured and when a line is logged is in ``dattrain.engine.reporter``; metrics of a task in ``dattrain.tasks``;
side-by-side measurements in ``dattrain.bench``.
"""
