"""Work on whole sets before a run, behind ``dattrain data``.

``sources.open_source`` opens whatever can be packed (``list_file`` and ``arrays`` are read for that alone), ``pack`` writes shards
with ``write_shard`` and ``dedup``, ``index_shards`` indexes the shards of others, ``verify`` reads and decodes everything, ``stats``
counts and measures. Reading sets in a run is in ``dattrain.data.source``; arguments and printing are in ``dattrain.cli.data``.
"""
