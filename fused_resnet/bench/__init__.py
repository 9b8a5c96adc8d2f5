"""Benchmarks: one process per provider, alternating rounds, results checked before they are timed.

:mod:`.harness` is the mechanism, :mod:`.worker` the program of each process; :mod:`.inference`,
:mod:`.operations` and :mod:`.providers` define what is measured, :mod:`.results` rows, tables and
files.

On a GPU (``make gpu``) :mod:`.gpu` has what is checked and measured, :mod:`.gpu_results` the
results file, and ``benchmarks/gpu_window`` runs it. :mod:`.gpu_layers`, :mod:`.gpu_cells` and
:mod:`.clock` time the roofline's blocks and single operators.
"""
