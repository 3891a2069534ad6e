"""Benchmarks: one command per goal, each measured beside its limit or its peers in the same run.

``python -m benchmarks S9 --json`` prints one line; ``python -m benchmarks all`` prints one for
each goal and writes the table and the plots in ``docs/benchmarks``. Servers are private, and
every contestant is a process of its own. Absolute figures drift from run to run and from machine
to machine: only ratios within one run count, and the CPU time per message travels best.
"""
