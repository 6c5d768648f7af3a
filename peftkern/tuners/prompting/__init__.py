"""Prompts as a tuner: virtual tokens and prefixes beside a model that is not changed."""
