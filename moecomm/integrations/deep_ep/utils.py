"""deep_ep.utils: the events, by the names of both releases."""

from .events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
