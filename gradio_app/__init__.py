"""The live demo: a thin app over `midas_ref.inference`. `make app` or `midas-ref app` starts it."""
