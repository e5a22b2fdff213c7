"""What was done: the record that a result carries, and the words and tables made of it.

record.py     rows, totals, tables
card.py       the model card
html.py       tables for notebooks
contents.py   what a checkpoint holds, in bytes
machine.py    what a result was computed on
page/         the HTML page
"""
