"""AdamW with moments in 8 bits: the fused step with surgery and clipping on the way, and a torch optimizer around it.

Not here: the number format of the moments (`quantize`), and the plan of the surgery (`gradients`).
"""
