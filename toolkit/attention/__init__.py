"""Attention on one device: what must move between slow and fast memory, and how small a state can recall?"""
