"""Folders that this program writes: who holds one, by which marker it knows its files, how new replace old ones."""
