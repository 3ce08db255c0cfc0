"""Record any tensor of a run by name, compare two runs, and find the first tensor that differs.

README.md has the parity tables, the Numerics table, and how to test a port.
"""
