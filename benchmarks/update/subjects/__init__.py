"""What can be timed as one update, and the models that it runs on: the ground of our own subject and of the baselines.

Neither a method nor a measurement is here; those are `baselines/` and `ours.py`, and `instruments/`.
"""
