"""The command `selfattn demo`: the attention of a trained model in a sentence (extra ``[examples]``)."""
