"""Adapters on disk: their tensors, loading, saving, cards, base weights, hot swapping."""
