"""How fast and how large: decode speed, memory, bytes that a step must read, and where a number came from."""
