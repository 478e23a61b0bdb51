"""Elastic membership: ranks that are lost, join or leave while a program runs."""
