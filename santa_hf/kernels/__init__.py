"""Triton kernels of decode attention; `launch` is the only entrance.

`scores` reads K once and leaves rounded weights, `sample` draws from them and gathers V, `fused` does
both in one pass (dense, and a fixed budget per tile), `common` holds what they share.
"""
