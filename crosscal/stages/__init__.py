"""The steps of a run, one file each, without an orchestrator: what `tasks/` wraps and `flows/` puts in order.

Steps hand each other small JSON references (names, digests, paths), never tensors; what is large stands in the store.
"""
