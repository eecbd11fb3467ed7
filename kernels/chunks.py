"""How many tokens' logits are held at once. Plain arithmetic without torch: the memory plan goes by it, too.

T tokens · D width · V vocabulary · C tokens of one chunk.
"""

CHUNK_TOKENS = 1024  # of the versions in plain PyTorch
# Logits that go through the softmax together on a CPU: 2 MiB of fp32 stay in its cache.
TILE_ELEMENTS = 1 << 19

SMALL_BUFFER = 1 << 28  # bytes of logits that never matter beside weights, gradients and activations
FEWEST, MOST = 1024, 8192  # tokens of a chunk


def chunk_tokens(T: int, V: int, D: int, element_bytes: int) -> int:
    """C, a power of two of 1024 to 8192 tokens, or fewer where T is smaller.

    For its 6·C·V·D operations a chunk reads and writes the weights' gradient in fp32, 8·V·D bytes: at 4 TB/s and
    700 TFLOP/s a quarter of their time for 1024 tokens, 3% for 8192. So as many as the memory allows: D tokens'
    logits are as large as the gradient in the inputs' dtype, which is made once they are gone; in a small
    vocabulary or width, what fits into SMALL_BUFFER.
    """
    wanted = min(max(D, SMALL_BUFFER // (V * element_bytes), FEWEST), MOST)
    return min(1 << (wanted.bit_length() - 1), 1 << max(T - 1, 0).bit_length())
