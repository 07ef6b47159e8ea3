"""Runs what Triton compiled, on the CPU: PTX, instruction by instruction, all threads of some programs at once."""
