"""What it costs: perplexity, tasks, size and speed.

perplexity.py     of a model on a text, with intervals
before_after.py   of the dense and the pruned model on the same windows
tasks.py          tasks of lm-evaluation-harness
comparison.py     scores of several models, paired by document
speed.py          how large and how fast a model is on this machine
timing.py         engines side by side
inspection.py     what is in a checkpoint, counted again
"""
