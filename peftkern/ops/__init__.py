"""Operations: one function each; they pick a backend and know tensors only."""
