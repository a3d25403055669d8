"""Thin Prefect tasks: each rebuilds what it needs from a JSON run spec, calls one stage of `crosscal`, returns JSON."""
