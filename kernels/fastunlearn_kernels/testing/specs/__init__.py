"""One file per op: its cases, what it is compared with, the bytes that it moves, and how its kernels are compiled.

Not here: the list of all of them (`testing.all_specs`), and what a spec is (`testing.common`).
"""
