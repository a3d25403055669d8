"""Which mixture to take, from what solutions lose on each corpus. Pure: what to try next, given what was tried."""
