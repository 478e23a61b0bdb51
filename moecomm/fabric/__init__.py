"""Symmetric memory over the ranks of both networks, and the verbs on it."""

from __future__ import annotations

from .domain import Domain
from .requests import Multicast, Reduce

__all__ = ["Domain", "Multicast", "Reduce"]
