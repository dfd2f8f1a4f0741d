"""Triton kernels, installed as fastpool.triton_kernels. This version has none yet."""
