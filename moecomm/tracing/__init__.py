"""What calls did: recordings, their replay, timelines."""
