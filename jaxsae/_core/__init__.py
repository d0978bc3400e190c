"""Internal utilities, independent of sparse autoencoders.

`arguments` validates options, `files` writes files atomically, `lazy` imports submodules on first use, `pytrees`
defines dataclasses that are pytrees, `linalg` is small dense linear algebra, `sparse` decodes sparse codes, and
`chunking` maps functions over rows in bounded memory.
"""
