"""What the extensions of all worlds share."""
