"""The loops: a recipe and a model go in, a pruned model and its report come out.

entries.py      single entries, block after block: calibrate, score, mask, repair
structured.py   whole units: which of the files below does what
recipe/units.py        states, channels and heads are cut out and the rest repaired
blocks.py       which blocks go
mixes.py        how much of which axis
widths.py       layers of different widths
projection.py   projected states of Mamba-2
preview.py      what a plan would do, before it is done
"""
