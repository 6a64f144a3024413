"""Kernels shared by several systems. Each is a plain function outside a cluster and charges its cost inside one."""
