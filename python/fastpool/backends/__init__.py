"""Adapters from a checked call to a kernel. Each offers `unavailable()`: why it serves nothing here, or None;
`refuses(tensor)`: why it cannot serve calls on that tensor, or None; and, where calls reach it through Python,
`pool(call)`, `pool_backward(call)`, `l2_normalize(call)` and
`l2_normalize_backward(call)`."""
