"""A few lines of text from a trained model, so that a person sees what a val_bpb reads like."""

import mlx.core as mx
import numpy as np

TOKENS = 200  # at most
TEMPERATURE = 0.8  # of the model's own distribution; below 1 it says what it is surer of


def sample(model, tokenizer, prompt, seed):
    """The prompt and how the model goes on, up to the end of a document, TOKENS tokens or its context: text.

    model: from token ids int32 (1, T) to logits (1, T, vocabulary). Each call has one shape, so nothing is compiled
    twice: what stands behind the last token is not seen.
    """
    context, ids = tokenizer.dataset.sequence_length, [tokenizer.bos, *tokenizer.encoding.encode_ordinary(prompt)]
    ids = ids[: context // 2] if prompt else ids
    row = np.full((1, min(context, len(ids) + TOKENS)), tokenizer.bos, np.int32)
    row[0, : len(ids)] = ids
    never = mx.array((tokenizer.token_bytes == 0) & (np.arange(tokenizer.vocab_size) != tokenizer.bos))
    mx.random.seed(seed)
    for at in range(len(ids), row.shape[1]):
        logits = model(mx.array(row))[0, at - 1].astype(mx.float32)
        token = mx.random.categorical(mx.where(never, -mx.inf, logits / TEMPERATURE)).item()
        if token == tokenizer.bos:
            return tokenizer.encoding.decode(row[0, 1:at].tolist())
        row[0, at] = token
    return tokenizer.encoding.decode(row[0, 1:].tolist())
