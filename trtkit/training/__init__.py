"""``trtkit train-drafter``: rows of problems and solutions to a trained and measured draft head."""
