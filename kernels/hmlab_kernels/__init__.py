"""The operators under the memories: one folder per operation."""
