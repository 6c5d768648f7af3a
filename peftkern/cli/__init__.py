"""The command line: ``peftkern train`` and ``peftkern demo``. Nothing here is imported by the
library.
"""
