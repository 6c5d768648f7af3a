"""``peftkern demo``: the same training in peftkern and in HF PEFT, side by side.

``run.py`` coordinates, ``worker.py`` runs one library. No other command imports these files.
"""
