"""Speed on the machine at hand: the roofline card, engines at several batch sizes, plain against speculative."""
