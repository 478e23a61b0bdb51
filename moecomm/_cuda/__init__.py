"""The cuda world: GPUs, NCCL, and how a call is spread over an SM."""
