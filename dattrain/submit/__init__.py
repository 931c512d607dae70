"""Slurm and local jobs: submit, follow, restart and cancel runs. No torch; a job imports it in its tasks alone.

In the order of a submission: ``plan`` (command line to stages; ``chain``, ``cluster`` and ``dependency`` read what it names),
``checks`` (what is refused), ``slurm`` (text of the batch script), ``submission`` (run folder, ``snapshot`` of the code, sbatch).
In the job: ``enter`` starts ``job_hook`` (before and after the tasks) and ``job`` (in each task); ``history`` decides what follows
an attempt, ``follow_up`` queues the next job, ``local`` does the same without Slurm. Afterwards: ``run_status``, ``queue``.
``enter``, ``job_hook``, ``follow_up``, ``history``, ``job_state``, ``command`` and ``shell`` run on a node's host with any
Python >= 3.8 and the standard library alone.

Not here: the signal and the save (``dattrain.runtime.signals``, ``dattrain.engine``), what a resumed run may not change
(``dattrain.engine.resume_rules``), who holds a run folder (``dattrain.runtime.owner``), the verbs (``dattrain.cli``).

To import from outside: ``plan.SubmitRequest``, ``submission.submit``, ``run_folders.find``, ``run_status``, ``history``, ``queue``,
``local`` and ``cluster.load``.
"""
