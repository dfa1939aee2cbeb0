"""Tensor parallelism: one engine over several processes, each with its share of every layer, one per GPU.

    group.py    what the ranks exchange within a step: sums, logits, drafts
    crew.py     the other processes, as the first one starts, instructs and watches them
    worker.py   what such a process does
    engine.py   the ``Engine`` of the first rank, whose calls the others repeat

Every rank runs the same engine: the same scheduler, the same cache blocks, the same draws. That is sound because
nothing in a step depends on anything but the calls and the logits. Requests come in the same order; each rank gets all
logits, and sampling them is whole-number arithmetic with noise of (seed, position), so each draws the same tokens. What
could differ between them is the first rank's: drafts (they may hang on the last bit of a score), and what is chosen by
the clock (which draft tree pays).

``checkpoint/rank_share.py`` says which part of the weights, heads and vocabulary belongs to a rank.
"""
