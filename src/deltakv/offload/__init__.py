"""KVPR (arXiv 2411.17089): a KV cache in host memory, part of it recomputed while the rest crosses the bus."""
