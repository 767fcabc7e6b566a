"""The decoder family: Llama, Qwen2, Qwen3 and their relatives, from one set of modules that can be parallelized.

`decoder`     the blocks, the part of them that a pipeline stage holds, and the protocol of an engine's model
`attention`   queries, keys and values, and the attention function; masks are made once per micro-batch
`cpu_attention` the same for CPUs in bf16, where torch's kernel is slow
`cache`       keys and values already seen, for generation
`rope`        rotary angles for given positions, with Llama 3's scaling
`embedding`   tokens to activations; its gradient is summed in fp32
`loss`        activations to the summed loss, a chunk of tokens at a time, so that the logits never exist at once
`adapters`    which parameters are trained, and low-rank layers beside the linear ones
`float8`      which linear layers compute in float8
`peft_folder` adapters in peft's files
`generate`    sampling one token at a time over a cache of keys and values
`flops`       the arithmetic of a token, for utilisation

Two shapes run through all of it. Between blocks activations are flat, `[tokens, width]`, row after row: a sequence-
parallel engine can gather them on dim 0, and only attention uses rows. The inputs of attention for a micro-batch (its
rows, rotary tables and mask) are computed once and passed to every block as one `AttentionContext`.

Nothing here depends on where it runs. There are no buffers, so `to_empty` is safe; layers are named by
their global number, so a stage uses the names of the whole model; linear layers, embedding and head are layers of
`stoker.parallel.tensor`, ordinary ones until ranks share them, and the number of heads is read off the weights.
Activations have the dtype of the weights, without autocast: an engine that computes in bf16 passes bf16 weights. Norms,
softmax, rotary angles and losses are fp32 inside.
"""
