"""Search for mixture weights by the losses of solutions on each corpus. Pure: next weights from those tried so far."""
