"""What ``make gpu`` asks a card: cases that check and measure, each of which yields rows.

A module of cases has a function ``cases(target, ...)``; ``benchmarks/gpu_window`` runs it in a
child process. Modules whose docstring says so need no built extension: they also compile kernels
while it is being built.
"""
