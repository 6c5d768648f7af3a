"""The pieces of ``ops.lora_experts``: records, the formula, the ways to compute it."""
