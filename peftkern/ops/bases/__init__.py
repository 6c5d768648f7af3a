"""Base weights that are quantised: what an operation needs of them, and a file for each format.

:mod:`.weight` has the interface, :mod:`.formats` finds the format of a layer. The library that
packed a weight stays its owner: a format reads its tensors, and calls its registered operators, but
nothing here imports it.
"""
