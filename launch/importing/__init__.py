"""`stoker import`: a checkpoint of another program as a folder that `model.init_from` reads.

`command`                opens the source, compares, writes the folder whole or not at all
`source`                 an opened source: tensors by Hugging Face's names, and the source's own logits
`pickled`                the only module that reads pickles, and what it makes of them
`hugging_face_bin`, `litgpt`, `distributed_checkpoint`, `deepspeed_folder`  one format each
`torchtitan`             its names and its order of rotary channels, in and out
`megatron`, `megatron_dist`, `megatron_arguments`  files of ranks, folders of DCP, and the model that both describe
`agreement`              the tensors against the model's own list, and the written folder's logits against the source's
`reference`              the decoder as other programs compute it

A folder of Hugging Face's is the result because everything after it exists: `model.init_from` refuses what does not
fit, compares logits with transformers', and lets each rank read its own slices only.
"""
