"""Types of the module."""

from .choice import Choice

class Chosen:
    def __init__(self, choice: Choice, routing: int, slots, counted) -> None: ...
