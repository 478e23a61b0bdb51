"""The cuda world: buffers and calls on GPUs, NCCL, and launch plans."""
