"""moecomm inside other libraries, one module for each; importing one needs that library."""
