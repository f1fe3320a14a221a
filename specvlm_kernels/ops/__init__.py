"""The public ops, one module each: contract, checks, allocation, dispatch."""
