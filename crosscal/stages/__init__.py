"""The steps of a run, one module each, without an orchestrator: `tasks/` wraps them, `flows/` orders them.

Steps exchange small JSON references (names, digests, paths), never tensors; large data is in the store.
"""
