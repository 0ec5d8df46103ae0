"""Benchmarks: a stranger that uses Tacit like any user. Figures go to ``bench/RESULTS.md`` by hand, with date and hardware."""
