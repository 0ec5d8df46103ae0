"""Benchmarks: a stranger that uses Tacit like any user.

Figures go to ``bench/RESULTS.md``, with date, hardware and the command that made them.
"""
