"""The command line: ``peftkern train``, ``tune`` and ``demo``. Nothing here is imported by the
library.
"""
