"""The 8-bit number formats, one scale per 256 elements: linear int8 for gradients, the dynamic map for moments.

Not here: what is done with the numbers (`gradients`, `adamw8bit`).
"""
