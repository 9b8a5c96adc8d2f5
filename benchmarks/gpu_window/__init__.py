"""The program of ``make gpu``: what a card is asked in one short window, and what comes back.

The parent process needs no build and no CUDA context: :mod:`.window` has the steps, :mod:`.budget`
their time, :mod:`.children` starts one process for each job, and :mod:`.rows` writes a line of JSON
the moment a child reports a result. What the children do is in :mod:`fused_resnet.bench.gpu`.
"""
