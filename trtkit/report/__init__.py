"""``trtkit report``: run directories -> one self-contained HTML page, and Markdown.

records.py    what a report knows of a run, as plain data
read.py       run directory -> ``Run``; the one place that knows the files, old and new
figures.py    ``Run`` -> ``Figures``: accuracy, pass@1, maj@k, rates, speed over time
compare.py    which runs had the same budget, and what may be said of several of them
charts.py     numbers -> positions inside an SVG
latex.py      LaTeX source -> text that can be read
page.py       all of that -> HTML and Markdown (templates/)
"""
