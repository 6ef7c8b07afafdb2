"""The parts of ``update/throughput.py``: what one update of the whole trainer costs, and a run's share of it.

What this is: ``rows.py`` names what is measured, ``models.py`` makes the model, ``subjects.py`` the run, ``clock.py``
and ``worker.py`` measure one row in a process of its own, ``flops.py`` and ``figures.py`` derive, ``sweep.py`` and
``report.py`` collect.
What this is not: part of the trainer. Nothing in ``fastunlearn`` imports it.
"""
