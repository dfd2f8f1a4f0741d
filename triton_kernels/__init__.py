"""Triton kernels, installed as fastpool.triton_kernels: every mode, both layouts, the whole epilogue in one launch."""
