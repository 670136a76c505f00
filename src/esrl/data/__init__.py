"""Text in, examples with stable ids out."""
