"""Types of the module."""

CODES: tuple[str, ...]
PHASES: tuple[str, ...]

class Failure:
    code: str
    phase: str
    peer: int
    detail: int
    reporter: int
    expected: object
    got: object
