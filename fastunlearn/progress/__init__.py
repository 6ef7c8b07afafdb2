"""How far a run is: fixed held-out pictures that are drawn now and then, as latents, and when that is enough.

What is asked for (``prompts``), drawing and comparing it (``probe``), what was seen (``reading``), and what follows
from that (``stopping``). Not the evaluation of a finished run, which is in ``evaluation/``.
"""
