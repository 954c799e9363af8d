"""Faults as a feature: what a run survives, struck on purpose, and an independent count of what it lost.

history.py     what a run's records say about each other: lost, doubled, unsent, altered, mixed
target.py      the processes, files and link of one run: what may be touched
nemesis.py     what can be done to a running run, and undone; storage.py: to what is written down
strikes.py     `sop chaos RUN`: strike a run on this machine until it ends, then check its history
faults.py      the fifty faults: what is required, and the tests that show it (rows in faults_of_*.py)
soak.py        `sop soak`: hours of robot time under random faults
drill.py       `sop chaos --check` and `--list`: run those tests, keep their results, print the table
"""
