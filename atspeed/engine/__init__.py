"""The engine: trie search, token trees, ONNX decoding, prefix cache. No gRPC, no torch.

Symbols, used in every docstring: `K` beams asked for, `N` draft width, `L` levels (codes per item), `C` code columns,
`V` vocabulary, `P` cached tokens, `S` new tokens of a pass, `n` nodes, `m` children, p the target, q the draft.
"""
