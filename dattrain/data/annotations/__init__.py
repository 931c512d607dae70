"""What lies beside images for dense tasks: maps of class numbers, and objects with boxes and masks. Bytes and numpy alone.

``dattrain.data.annotations.semantic`` makes the map that a network learns from of either, ``detection`` its objects; ``map_folder``, ``coco`` and ``voc`` are
data sets as they are given out, which ``dattrain.data.source.dataset`` opens; ``rle`` and ``polygons`` read the masks of objects.
"""
