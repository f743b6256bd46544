"""Triton kernels of decode attention; `launch` is the only entrance.

`scores` reads K once and leaves rounded weights, `sample` draws from them and gathers V; `flash` draws a
fixed budget per tile in one pass, `dense` is exact; `latent` is for multi-head latent attention. Each
holds a kernel and its host side. What they share is in `common` on the device and in `host` on the host;
`launcher` launches them and gives them workspaces.
"""
