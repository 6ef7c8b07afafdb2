"""What tests, ahead-of-time checks and benchmarks know about the ops: specs, cases, machine code, the report.

Not here: anything that an op needs to run; `import fastunlearn_kernels` never imports this package.
"""
