"""Operations, one function each, on tensors only; they choose a backend."""
