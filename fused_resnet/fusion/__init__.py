"""Fusing the modules of an existing model, and reporting what was fused."""
