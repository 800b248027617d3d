"""The only modules that communicate: what travels (plan), the order (rounds), the way (ways), the collectives."""
