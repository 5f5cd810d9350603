"""Whole repositories and directories that are not ours to arrange: one module for each thing that `layout` lays out."""
