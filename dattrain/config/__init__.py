"""Recipes: what a run is asked to do, as frozen and validated values.

``sections`` and ``data_sections`` have every key with its type, default and meaning, and ``schema`` what goes together; ``load`` reads YAML,
``extends`` and ``key=value``, and knows where each value came from; ``derive`` computes what follows for a number of devices;
``run`` says which folder is meant; ``shipped`` finds recipes, chains and cluster profiles by their names. Others import
``schema.Config``, ``load.load``, ``load.dump``, ``derive.derive``. No torch, and nothing else of the package but
``dattrain.errors``.

Not here: cluster profiles and chains (``dattrain.submit``), the recipes themselves (``configs/``).
"""
