"""Everything that a GPU is asked, one command: ``python -m benchmarks.gpu`` (docs/benchmarks/gpu.md).

``__main__`` reads arguments and walks the stages; ``stages`` lists them; ``runner`` starts each as a child process and
keeps ``results.json``; ``bars`` says what is asked of their figures, and makes the table; ``job`` is what a stage sees. The stages
themselves are the other files.
"""
