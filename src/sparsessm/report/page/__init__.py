"""The page about a result: one HTML file that a browser shows without asking anybody for anything.

measured.py    what was measured of a result and its dense model: plain values
markup.py      the only place where text becomes HTML
parts.py       tables, figures, key figures
pictures.py    plots as SVG whose colours follow light and dark
words.py       numbers and the headline as sentences
layers.py      the record by layer and matrix
asked.py       what was asked and done, as sentences
searched.py    what `fit` found, for the page
costs.py       perplexity, tasks, bytes, speed, other sizes
places.py      layers and matrices, tokens and windows
repeating.py   what was not tested, and how to repeat it
document.py    the whole page
page.css, page.js   its style, and sorting
"""
