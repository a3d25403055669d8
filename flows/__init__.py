"""Prefect flows: the order of the steps of a run, and the continuous service around it."""
