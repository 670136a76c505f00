"""Stage one: sampling without a graph."""
