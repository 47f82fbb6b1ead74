"""The datasets by name: where each comes from, and the sizes that every experiment on it shares.

How a source is fetched, read and split stands in harness/corpus.py. Another dataset of parquet files on the hub is
one entry more.
"""

import sys

from harness.corpus import Dataset, Folder, HubShards, ShuffledShards, StandardLibrary

DATASETS = {
    d.name: d
    for d in (
        # the running Python's own standard library; no network
        Dataset("stdlib", StandardLibrary(),
                vocab_size=1024, sequence_length=256, eval_tokens=262_144),
        # web text, 10 of 6543 shards for training
        Dataset("climbmix", HubShards("karpathy/climbmix-400b-shuffle", train=10, val=6542, test=6541),
                vocab_size=8192, sequence_length=2048, eval_tokens=20_971_520),
        # short children's stories
        Dataset("tinystories", ShuffledShards("karpathy/tinystories-gpt4-clean", train=20, val=20, test=21),
                vocab_size=2048, sequence_length=512, eval_tokens=1_572_864),
        # a folder of your own: FILES=dir with .parquet, .jsonl or .txt
        Dataset("files", Folder(),
                vocab_size=8192, sequence_length=2048, eval_tokens=20_971_520, eval_fraction=1 / 20),
    )
}  # fmt: skip


def get_dataset(name):
    """The `Dataset` called `name`; an unknown name ends the program with the known ones."""
    if name not in DATASETS:
        sys.exit(f"error: unknown dataset '{name}'; known: {', '.join(DATASETS)}")
    return DATASETS[name]
