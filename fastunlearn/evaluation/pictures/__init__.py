"""The pictures of an evaluation: what is asked for in each of them, and drawing them from a prompt and a seed.
Not here: who looks at them (`evaluation/classifiers/`), or what that comes to (`evaluation/metrics/`)."""
