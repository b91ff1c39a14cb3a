"""When do two answers agree? The inside of thor/verify.py.

- clean.py: rewrites LaTeX layout, Unicode and Python in one notation
- reader.py: text -> tree (tree.py), with the units of units.py and the vocabulary of names.py
- compare.py: the rules for texts, lists, sets, tuples, intervals, matrices, equations, units and exact numbers
- numeric.py: compares all other expressions by their values, in a worker process (workers.py)

Nothing here imports the rest of thor, so that workers start fast and stay small.
"""
