"""The portable GPU tier: one Triton kernel module per op, also runnable on the CPU with TRITON_INTERPRET=1."""
