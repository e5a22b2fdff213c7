"""One run, and questions that take several to answer.

run.py         windows, measure, prune, save: the steps of one
windows.py     how many calibration windows are enough
tolerance.py   which parts of a model tolerate how much: every matrix pruned alone
cells.py       these runs
drift.py       does traffic look like the text that a model was pruned for: the statistics
traffic.py     the same, of a running model
findings.py    what they show, as tables and a picture
fit.py         how small a model may be: the search and its finding (limits, search, unseen, trials, shown)
"""
