"""Adapter methods: what changes in a model, and where."""
