"""Thin Prefect tasks: each rebuilds what it needs from a JSON ticket, calls one stage of `crosscal`, returns JSON."""
