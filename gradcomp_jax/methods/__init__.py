"""The papers' ways to train with outer steps, one file for each line of papers."""
