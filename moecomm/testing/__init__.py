"""The oracle: what dispatch, combine and quantization must return, in slow and obvious torch."""
