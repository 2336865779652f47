"""Memory that lives on disk or other machines, and the rules by which slots move between the tiers above it."""
