"""Serving: a prefill unit, a decode unit, and a router with an OpenAI endpoint."""
