"""Parts of moecomm._native.cuda: the world of GPUs."""
