"""What one update of the trainer costs, and a run's share of it, beside the published ways: ``throughput.py``.

Nothing in ``fastunlearn`` imports this; the instruments and the baselines have folders of their own.
"""
