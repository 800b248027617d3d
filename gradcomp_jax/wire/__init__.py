"""Formats of the wire: how codes become bytes."""
