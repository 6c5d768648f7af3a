"""The command line: ``peftkern train``, ``tune`` and ``demo``; the library imports none of it."""
