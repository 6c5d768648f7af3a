"""Files: replaced so that no reader sees a part, and found in a folder or on the hub."""
