"""Bases whose weights are stored as codes, or were codes when the adapter was trained: seen as dense, block by block.

`codings` says what the codes are; `bitsandbytes`, `hqq`, `gptq` and others, a file for each layout, find them in a
checkpoint; `decode` and `decode_columns` turn a range of them into values; `base` decides with the user which weights a
merge works on.
"""
