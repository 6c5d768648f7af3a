"""New values for single tokens of an embedding, trained beside LoRA (``trainable_token_indices``).

The stand-alone method of that name (PEFT's ``TrainableTokensConfig``) is not part of peftkern.
"""

from .layer import TrainableTokensLayer
from .wrapper import TrainableTokensWrapper

__all__ = ["TrainableTokensLayer", "TrainableTokensWrapper"]
