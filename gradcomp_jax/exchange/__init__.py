"""The only rooms that talk: what travels (plan), in which order (rounds), how (ways), by what (collectives)."""
