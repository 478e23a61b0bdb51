"""Integrations of moecomm with other libraries, one module per library. Importing a module needs its library."""
