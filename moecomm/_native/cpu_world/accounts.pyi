"""Types of the module."""

ROLES: tuple[str, ...]
