"""Types of the module. Only Cython code uses its functions."""
