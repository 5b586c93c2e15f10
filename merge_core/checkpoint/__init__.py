"""Checkpoints on disk: a strict reader, a Merkle manifest, a crash-safe writer.

    manifest  what a checkpoint consists of, and the ModelId that follows
    merkle    one digest per MiB, one root per tensor, one root per model
    header    the strict safetensors header parser
    published what of a directory is published, and under which names
    reader    a Hugging Face directory read with pread
    sharding  which tensors lie in which weight file
    writer    a new directory, preallocated and renamed into place when whole
    layout    tensor name -> layer and role
    source    the port through which arithmetic reads verified bytes

Nothing here imports torch or transformers, or runs anything that a checkpoint contains.
"""
