"""Processes: signals that ask for an end, the ranks of a run and what starts them. Nothing of ours is imported."""
