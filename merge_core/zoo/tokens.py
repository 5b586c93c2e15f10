"""The zoo's tokenizers as ordinary `tokenizer.json` files: characters for its tasks, bytes for its texts."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from merge_core.zoo.domains import BOS, EOS, FIRST_CHARACTER, PAD, VOCABULARY
from merge_core.zoo.recipes import Shape

_SPECIAL = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}


def tokenizer_for(shape: Shape) -> PreTrainedTokenizerFast:
    """The tokenizer of the models of a shape: which one it is follows from the number of tokens."""
    characters = shape.vocabulary == VOCABULARY
    names = {f"{name[1:-1]}_token": name for name in _SPECIAL} if characters else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=_characters() if characters else _bytes(),
        clean_up_tokenization_spaces=False,
        model_max_length=shape.context,
        **names,
    )


def _characters() -> Tokenizer:
    """One token per printable ASCII character; others are dropped."""
    characters = {chr(FIRST_CHARACTER + i): i + 3 for i in range(VOCABULARY - 3)}
    tokenizer = Tokenizer(models.BPE(vocab={**_SPECIAL, **characters}, merges=[]))
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bytes() -> Tokenizer:
    """One token per byte, its id the byte: byte-level BPE that merges nothing, without special tokens."""
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_symbols())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _symbols() -> list[str]:
    """What byte-level BPE writes for each byte: its own character if one sees it, else one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(unseen)) for byte in range(256)]
