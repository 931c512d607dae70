"""A run as one page that needs nothing else: ``RUN/report.html``, and ``RUN/results.png`` beside it.

- ``training``: ``train`` of the engine, with the page written at every evaluation and at the end.
- ``page``: what the page shows of a run, from the files of its folder, and the page itself (``page.html``).
- ``curves``, ``timeline``, ``settings``: its parts; pure functions of rows, events and a config. ``extremes``: which images. ``chart``: the picture.
- ``pictures``: the best and worst images with the sampling points that the network chose; the one part that opens weights.

What jobs a run had is given to it (``dattrain.submit`` knows); evaluating with tables and intervals is in ``dattrain.evaluation``.
"""
