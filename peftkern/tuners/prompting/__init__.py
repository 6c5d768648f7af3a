"""The tuner for prompts: virtual tokens and prefixes beside a model that is not changed."""
