"""Frozen models: batch norm folded, weights packed, ready to be saved, exported and served."""
