"""What it costs: perplexity, tasks, size and speed.

perplexity.py     of a model on a text, with intervals
before_after.py   of the dense and the pruned model on the same windows
divergence.py     of both models token by token: KL, the windows that suffered
beside_dense.py   a result beside its dense model: all that its page shows
tasks.py          tasks of lm-evaluation-harness
comparison.py     scores of several models, paired by document
speed.py          how large and how fast a model is on this machine
timing.py         engines side by side
inspection.py     what is in a checkpoint, counted again
"""
