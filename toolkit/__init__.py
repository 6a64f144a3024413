"""The Communication Bottleneck: about ninety systems that fight for bytes, each small enough to read.

toolkit.runtime    a virtual cluster: ranks, links, clocks, memory
toolkit.kernels    numba kernels, each with its declared cost
toolkit.<part>     the systems, one module each
toolkit.claims     what each paper says, measured
toolkit.show       what the chapters draw with
"""
