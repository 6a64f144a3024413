"""Attention over a sequence that is spread over ranks: what moves, keys and values, queries, or heads?"""
