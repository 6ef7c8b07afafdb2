"""Meta-Unlearning (arXiv 2410.12777): the gradient of a loss that is taken after a simulated attack.

What this is: ``prompts.py`` what the three sets ask for, ``sets.py`` their pictures, ``attack.py`` the simulated
fine-tuning, ``second_order.py`` the gradient through it, and ``term.py`` what an update gets on top.
What this is not: an erasure method. Any of them may be the base.
"""
