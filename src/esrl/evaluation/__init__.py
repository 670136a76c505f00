"""Decoding and scoring of test sets."""
