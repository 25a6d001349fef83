"""deltakv inside an unpatched vLLM: a plugin that makes decode rows sparse, on vLLM's own paged KV cache.

`plugin.register` is the entry point (`vllm.general_plugins`); docs/vllm.md tells how it works and what is refused.
"""
