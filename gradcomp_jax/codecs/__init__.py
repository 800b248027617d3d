"""The codecs: one paper, one file."""
