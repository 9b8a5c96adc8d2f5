"""Benchmarks: one process per provider, alternating rounds, results checked before they are timed.

:mod:`.harness` is the mechanism, :mod:`.worker` the program of each process; :mod:`.inference`,
:mod:`.operations` and :mod:`.providers` define what is measured, :mod:`.results` rows, tables and
files.

On a GPU (``make gpu``) :mod:`.gpu_layers` and :mod:`.gpu_networks` define what is measured,
:mod:`.gpu_cells` and :mod:`.clock` how, :mod:`.gpu_session` in which processes, and
:mod:`.gpu_results` the results file.
"""
