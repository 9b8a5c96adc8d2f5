"""Benchmarks to trust: one process a provider, alternating rounds, answers checked first.

:mod:`.harness` holds the mechanism, :mod:`.worker` what runs in each process, :mod:`.networks`,
:mod:`.operations` and :mod:`.providers` what is measured, :mod:`.results` rows, tables and files.
"""
