"""For tests, ours and those of adapter authors: ranks in a pool, matrices with known answers."""
