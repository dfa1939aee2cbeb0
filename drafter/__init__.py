"""The ReDrafter (arXiv 2403.09919) as a library of its own: a recurrent draft head for a frozen decoder."""
