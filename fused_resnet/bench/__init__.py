"""Benchmarks to trust: one process a provider, alternating rounds, answers checked first.

:mod:`.harness` holds the mechanism, :mod:`.worker` what runs in each process, :mod:`.networks`,
:mod:`.operations` and :mod:`.providers` what is measured, :mod:`.results` rows, tables and files.

On a GPU (``make gpu``) :mod:`.gpu_layers` and :mod:`.gpu_networks` are what is measured,
:mod:`.gpu_cells` and :mod:`.clock` how, :mod:`.gpu_session` in which processes, and
:mod:`.gpu_results` the results file.
"""
