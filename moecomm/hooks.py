"""Hooks: functions that a user has registered at the stages of a Buffer's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from collections import OrderedDict

from torch.utils.hooks import RemovableHandle

from .errors import InvalidArgument

STAGES = ("pre_dispatch", "post_dispatch", "pre_combine", "post_combine")


class Hooks:
    """The hooks of one Buffer. They outlive its memory. .any: whether any hook was ever registered."""

    def __init__(self) -> None:
        self.any = False
        self._by_stage: dict[str, OrderedDict[int, Callable[[Any], Any]]] = {}

    def register(self, stage: str, fn: Callable[[Any], Any]) -> RemovableHandle:
        """See Buffer.register_hook.

        Raises
        ------
        InvalidArgument
        """
        if stage not in STAGES:
            raise InvalidArgument(
                f"register_hook: stage is {stage!r}; expected one of {', '.join(STAGES)}", op="register_hook"
            )
        self.any = True
        hooks = self._by_stage.setdefault(stage, OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = fn
        return handle

    def run(self, stage: str, value: Any) -> None:
        """Call the hooks of a stage."""
        for fn in list(self._by_stage.get(stage, {}).values()):
            fn(value)
