"""Triton kernels, one file per operator; `drcnn.ops` calls them. Importing a file imports Triton."""
