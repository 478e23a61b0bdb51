"""Parts of moecomm._native.core: the world of CPUs."""
