"""``peftkern demo``: the same training in peftkern and in HF PEFT beside each other.

``run.py`` leads, ``worker.py`` is either library's half. No other command imports anything here.
"""
