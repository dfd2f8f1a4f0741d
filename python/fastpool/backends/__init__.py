"""Adapters from a checked call to a kernel. Each offers `unavailable()`: why it serves nothing here, or None;
`supports(call)`: None where it can serve the call, else why not; and, where calls reach it through Python,
`pool(call)`, `pool_backward(call)`, `l2_normalize(call)`, `l2_normalize_backward(call)`, `quantize(call)`,
`tokens(call)` and `tokens_backward(call)`."""
