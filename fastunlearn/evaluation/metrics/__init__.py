"""The figures of an evaluation, one file for each question; and how they become a result with intervals.
Not here: which pictures are drawn (`evaluation/pictures/`), or who looks at them (`evaluation/classifiers/`)."""
