"""deep_ep.utils: EventHandle and EventOverlap, as both releases of deep_ep export them."""

from .events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
