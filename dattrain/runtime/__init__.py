"""The processes of a job and the machines that they run on: nothing of models, data or tasks.

``environment`` says who this process is and joins the process group, ``spawn`` starts local ranks, ``preflight`` checks
nodes before a job begins, ``collectives`` exchanges small objects between ranks, ``signals`` turns a preemption or a stop into
a request, ``health`` ends a job that stalled, ``owner`` (with ``claims`` and ``process``) keeps a run folder to one training at
a time, ``logging`` writes a file per rank, ``progress`` says how far a long task is.

Not here: writing files atomically (``dattrain.files``, which every package may import), Slurm (``dattrain.submit``), what the
trainer does about a signal (``dattrain.engine``).
"""
