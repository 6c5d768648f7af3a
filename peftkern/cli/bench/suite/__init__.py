"""What pytest collects for ``peftkern bench``."""
