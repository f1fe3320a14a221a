"""Adapters that let the decoding loop run other libraries' models."""
