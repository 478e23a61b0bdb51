"""Parts of moecomm._native.sim: the world of a virtual clock."""
