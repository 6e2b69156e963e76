"""A KV cache that passes only its used slots to attention: without empty slots no mask is needed."""

import torch
from transformers.cache_utils import Cache


class SlicedCache(Cache):
    """Buffers of `capacity` slots; `length` of them are used, and the caller maintains it. An update is written after
    them."""

    def __init__(self, config, capacity, device, dtype):
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # The base class is for isinstance alone: its layers would bring masks.
        self.layers, self.layer_class_to_replicate, self.offloading = [], None, False
        empty = lambda: torch.zeros((1, heads, capacity, width), device=device, dtype=dtype)  # noqa: E731
        self.slots = [(empty(), empty()) for _ in range(config.num_hidden_layers)]
        # A compiled step writes to them: torch captures that in a CUDA graph only where they stay.
        for slots in (slots for pair in self.slots for slots in pair):
            torch._dynamo.mark_static_address(slots)
        self.length = 0

    def update(self, keys, values, layer, *_arguments, **_keywords):
        end = self.length + keys.shape[2]
        for slots, new in zip(self.slots[layer], (keys, values)):
            slots[:, :, self.length:end].copy_(new)
        return tuple(slots[:, :, :end] for slots in self.slots[layer])

    def get_seq_length(self, *_arguments, **_keywords):
        return self.length

    def get_mask_sizes(self, query, *_arguments, **_keywords):
        new = query if isinstance(query, int) else query.shape[0]
        return self.length + new, 0

    def get_max_cache_shape(self, *_arguments, **_keywords):
        return -1

    @property
    def is_compileable(self):
        """Static caches get a mask even for one token."""
        return False
