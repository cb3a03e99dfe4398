"""Numbers and how far to trust them: metrics, intervals, comparisons, ratings, and their tables."""
