"""Memories that live in the context and the state, in the place of attention: one file, one architecture."""
