"""Gradient surgery on lists of tensors and flat partitions: inner products, coefficients, correction, per segment.

Not here: how a retain gradient is kept in 8 bits (`quantize`), and the optimizer's step (`adamw8bit`).
"""
