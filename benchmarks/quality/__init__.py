"""What erasing does to pictures: every method on MiniCanvas, the protection of what is kept, and relearning attacks.

Each program trains as a user would, keeps finished parts in its output folder, and prints a table of its rows. What an
update costs is measured in `update/`.
"""
