"""``peftkern bench``: peftkern beside HF PEFT and others, on the user's model and machine."""
