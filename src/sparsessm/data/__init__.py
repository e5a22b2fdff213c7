"""What comes from outside, read with care: text, files that others wrote, names that are shown.

texts.py        text -> token windows
text_files.py   texts in local files and directories
edition.py      which text was read
foreign.py      JSON and YAML of others, within bounds
inert.py        foreign names that can do nothing to a terminal or a page
unfinished.py   half-written files are taken away when a run is stopped
"""
