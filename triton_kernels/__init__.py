"""Triton kernels, installed as fastpool.triton_kernels. There are none yet: see CONTRIBUTING.md for where they go."""
