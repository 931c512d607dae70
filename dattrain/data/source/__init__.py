"""Where samples come from: ``dataset.open_dataset`` opens tar shards, local or remote, and folders of images.

``sample`` says what a data set is (``Dataset``, ``Sample``). Local sets: ``shards`` and ``tar`` (bytes), ``index`` and
``build_index`` (where each image lies in its shard), ``inventory`` and ``manifest`` (what should be there, and its classes),
``folders``. Remote ones: ``remote`` over ``listing`` (names), ``download`` (bytes) and ``disk_cache``. Lists of images and arrays
are read for packing alone, in ``dattrain.data.prepare``; images stay encoded here, and are decoded in ``dattrain.data.decode``.
"""
