"""Types of the module."""

MUTANTS: tuple[str, ...]
