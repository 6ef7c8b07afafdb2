"""The published ways to do the same U-Net work, written anew from what the methods' released code does.

Each file says what it evaluates per update and where that is known from. Quality is not compared here.
"""
