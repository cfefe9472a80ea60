"""From documents to batches: corpora, token shards, windows, and a loader whose position is a number."""
