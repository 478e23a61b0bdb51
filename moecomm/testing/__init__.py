"""The oracle: slow, obvious torch code that computes the results of dispatch, combine and quantization."""
