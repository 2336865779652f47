"""Questions that were put to the memories: each module asks one, trains what it takes, and makes a table."""
