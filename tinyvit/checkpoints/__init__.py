"""Saving and loading weights, ours and other libraries': written whole or not at all, read without executing anything.

From bottom to top: `checkpoint` (the dataclass and its error), `readers` (files to arrays), `native_file` (our own
files), `formats` (other libraries' names to ours), `loading` and `convert`.
"""
