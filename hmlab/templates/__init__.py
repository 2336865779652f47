"""Files to copy: each is a complete, working part."""
