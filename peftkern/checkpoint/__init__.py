"""Adapters on disk: what they consist of, loading, saving, cards, base weights, hot swapping."""
