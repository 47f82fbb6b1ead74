"""The tokenizer of a dataset: byte-level BPE, trained on the training text, saved as JSON."""

import base64
import json
from itertools import chain

import numpy as np
import rustbpe
import tiktoken

from harness.corpus import cache_dir, refuse_cache
from harness.files import write_atomically

# GPT-4's split pattern, but digits in groups of one or two: a small vocabulary has no room for
# a thousand three-digit numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|document|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")
TRAINING_CHARACTERS = 250_000_000  # enough for merges to settle; more only takes longer
DOCUMENT_CHARACTERS = 10_000  # of one document, so that none dominates
STRETCH = 900_000  # characters encoded at once: the library panics at a million blanks in a row


class Tokenizer:
    """Byte-level BPE of one dataset. Its special ids come last, the document start first of them.

    Attributes: `dataset`, `vocab_size`, `bos` (id of the document start), `token_bytes`
    (int32, (vocab_size,): UTF-8 length of each token, 0 for special ones).
    """

    def __init__(self, dataset, tokens):
        """tokens: the bytes of each that is no special one, by their ids."""
        self.dataset, self.tokens, self.bos = dataset, tokens, len(tokens)
        ranks = {token: i for i, token in enumerate(tokens)}
        special = {token: i for i, token in enumerate(SPECIAL_TOKENS, self.bos)}
        self.encoding = tiktoken.Encoding("BPE", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = len(ranks) + len(special)
        self.token_bytes = np.array([*map(len, tokens), *[0] * len(special)], np.int32)

    @classmethod
    def train(cls, dataset, texts):
        """Learn the merges from `texts` (an iterable of str)."""

        def limited():
            seen = 0
            for text in texts:
                yield text[:DOCUMENT_CHARACTERS]
                seen += min(len(text), DOCUMENT_CHARACTERS)
                if seen >= TRAINING_CHARACTERS:
                    return

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(limited(), dataset.vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls(dataset, [bytes(token) for token, _ in trainer.get_mergeable_ranks()])

    def encode_documents(self, texts):
        """The token ids of each of `texts`, uint16 (n,), with the document start in front.

        Special tokens written out in a text are ordinary text. All texts are one call of the library, during which
        other threads run: in a call each, they would wait for each other most of the time.
        """
        start = SPECIAL_TOKENS[0]
        alone = {i for i, text in enumerate(texts) if start in text or len(text) > STRETCH}
        joined = "".join(start + (text if i not in alone else "") for i, text in enumerate(texts))
        ids = self.encoding.encode_to_numpy(joined, allowed_special={start}, disallowed_special=()).astype(np.uint16)
        found = np.split(ids, np.flatnonzero(ids == self.bos)[1:])
        for i in alone:
            parts = (texts[i][first : first + STRETCH] for first in range(0, len(texts[i]), STRETCH))
            found[i] = np.array([self.bos, *chain(*map(self.encoding.encode_ordinary, parts))], np.uint16)
        return found

    def save(self, path):
        """Write the tokenizer as JSON: data only, loading it runs nothing."""
        write_atomically(path, json.dumps([base64.b64encode(token).decode() for token in self.tokens]))

    @classmethod
    def load(cls, dataset):
        """The dataset's prepared tokenizer; where there is none, one line says how to make it."""
        try:
            saved = json.loads((cache_dir(dataset) / "tokens" / "tokenizer.json").read_text())
            return cls(dataset, [base64.b64decode(token) for token in saved])
        except (OSError, ValueError, TypeError):
            refuse_cache(dataset.name)
