"""Files: atomic replacement, and finding them in a folder or on the hub."""
