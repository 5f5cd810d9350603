"""Text from decoders, many requests at a time.

    request -> tokenizer -> engine (waiting | joining | running) -> executor -> logits -> sampling -> text -> events

The engine knows sequences and nothing of tensors; an executor knows the state of its model and nothing of requests.
"""
