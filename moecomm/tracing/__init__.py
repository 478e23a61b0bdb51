"""Recordings of calls, their replay, and timelines."""
