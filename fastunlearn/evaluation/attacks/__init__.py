"""What an attacker does to an erased model, one file per attack.
Not here: the schedule and the measurement of a test (`evaluation/relearning/`)."""
