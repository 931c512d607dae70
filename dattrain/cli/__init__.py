"""The command line: one file per verb, with its arguments and what it prints, and nothing that anyone would import.

``main`` finds the verb and turns a ``UserError`` into one line and an exit code. A verb's file is loaded when the verb is named,
and loads heavy libraries in ``run``, so that help is quick. What the verbs do is in ``evaluation``, ``pretrained``,
``visualize``, ``planning``, ``bench``, ``submit`` and ``engine``; from Python, ``import dattrain`` offers the same (``dattrain.api``).
"""
