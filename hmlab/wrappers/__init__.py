"""What goes round a whole causal language model and remembers from segment to segment."""
